// Tensors to the arguments of sampling.h.
#include "bindings.h"
#include "sq_cpu/sampling.h"

namespace sq_cpu::bindings {

// `edits` and `allowed` are None, or have an entry for each row, None or (ids, divisors, addends),
// and None or int32 words.
void sample(py::handle logits, py::handle temperature, py::handle top_k, py::handle top_p,
            py::handle min_p, py::handle stream, py::handle position, py::handle edits,
            py::handle allowed, py::handle ids) {
  const Torch& torch = Torch::get();
  const std::vector<int64_t> shape = shape_of("logits", logits, 2);
  const int64_t count = shape[0], vocabulary = shape[1];
  auto* const x = array<float>("logits", logits, torch.float32, bounded_product(count, vocabulary));
  const auto* const temperatures =
      array<const float>("temperature", temperature, torch.float32, count);
  const auto* const most = array<const int64_t>("top_k", top_k, torch.int64, count);
  const auto* const sums = array<const float>("top_p", top_p, torch.float32, count);
  const auto* const least = array<const float>("min_p", min_p, torch.float32, count);
  const auto* const streams = array<const int64_t>("stream", stream, torch.int64, count);
  const auto* const positions = array<const int64_t>("position", position, torch.int64, count);
  const auto entries = [count](const char* name, py::handle given) {
    const auto all = given.is_none() ? py::list() : given.cast<py::list>();
    SQ_CHECK(given.is_none() || static_cast<int64_t>(all.size()) == count, name, " are of ",
             all.size(), " rows, not ", count);
    return all;
  };
  const py::list row_edits = entries("edits", edits), row_allowed = entries("allowed", allowed);
  std::vector<SampledRow> rows;
  for (int64_t i = 0; i < count; ++i) {
    SampledRow row{x + i * vocabulary,
                   temperatures[i],
                   most[i],
                   sums[i],
                   least[i],
                   static_cast<uint64_t>(streams[i]),
                   static_cast<uint64_t>(positions[i]),
                   {},
                   nullptr};
    if (!edits.is_none() && !row_edits[i].is_none()) {
      const auto [edited, divisors, addends] =
          row_edits[i].cast<std::tuple<py::object, py::object, py::object>>();
      const int64_t n = shape_of("edited ids", edited, 1)[0];
      row.edits = {n, array<const int64_t>("edited ids", edited, torch.int64, n),
                   array<const float>("divisors", divisors, torch.float32, n),
                   array<const float>("addends", addends, torch.float32, n)};
    }
    if (!allowed.is_none() && !row_allowed[i].is_none()) {
      row.allowed = array<const uint32_t>("allowed", py::object(row_allowed[i]), torch.int32,
                                          vocabulary / 32 + (vocabulary % 32 != 0));
    }
    rows.push_back(row);
  }
  auto* const chosen = array<int64_t>("ids", ids, torch.int64, count);
  const Door door;
  sq_cpu::sample(rows.data(), count, vocabulary, chosen);
}

}  // namespace sq_cpu::bindings
