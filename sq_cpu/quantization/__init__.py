"""The one stage that changes a model, and the record of what it did."""
