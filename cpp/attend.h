// Attention inside a region: each worker calls these, with its own workspace.
#pragma once

#include <atomic>
#include <vector>

#include "blocking.h"
#include "gemm.h"
#include "kernel.h"
#include "kv_page.h"
#include "sq_cpu/attention.h"

namespace sq_cpu {

// Throws std::invalid_argument for options that no heads can have.
void check_options(const AttentionOptions& options);

struct AttentionArgs {
  const KvCache& cache;
  const Sequences& sequences;
  int64_t heads;
  HeadRows q;
  HeadTransform transform;  // of q
  const AttentionOptions& options;
  HeadResult y;
};

// Rows of a kv head: row r is its query head r % group of token r / group.
struct AttentionBlock {
  int64_t sequence;
  int64_t kv_head;
  Range rows;
  Range keys;  // that any of the rows sees
};

// The tasks of an attention. They follow from the sequences, the heads and what is visible, so
// layers that are alike share them.
class AttentionPlan {
 public:
  AttentionPlan(const Sequences& sequences, int64_t heads, int64_t kv_heads, int64_t head_dim,
                const AttentionOptions& options, int available);

  int workers() const { return workers_; }
  int64_t workspace() const;                         // bytes of each worker's
  int64_t partials() const { return partials_; }     // floats that all share
  int64_t blocks() const { return blocks_.size(); }  // ints `finished`, 0 before and after

  // `counter`: 0 at first. `append`: null, or what is to be written to the pages before, where
  // appends_within(); `workspace` has append_workspace() bytes more then.
  void run(const AttentionArgs& args, Isa isa, WorkCounter& counter, std::atomic<int>* finished,
           std::byte* workspace, float* partials, const AppendArgs* append = nullptr) const;

  // Whether a task that sees a new token can write it: no other reads its page meanwhile.
  bool appends_within() const { return appends_within_; }

 private:
  struct Task {
    int64_t block;
    int64_t chunk;
    int64_t partial;  // the block's first, in floats
  };
  std::vector<AttentionBlock> blocks_;
  std::vector<Task> tasks_;  // empty: a task for each block
  int64_t head_dim_;
  int64_t partials_ = 0;
  bool appends_within_ = true;
  int workers_;
};

}  // namespace sq_cpu
