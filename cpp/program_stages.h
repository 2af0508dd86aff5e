// A decoder as stages: what program.cc has checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <variant>
#include <vector>

#include "gemm.h"
#include "sq_cpu/program.h"

namespace sq_cpu {

// Linears of a stage that are dealt out as one product.
struct Product {
  int first;
  int count;
  Order order;
};

struct Project {
  ProjectStage stage;
  std::vector<ProjectedLinear> linears;
  std::vector<Product> products;
  bool float_columns;
  bool in_float;

  // Whether it is known before the step which weights will be read.
  bool is_read_in_order() const { return !in_float && stage.list < 0; }
};

struct Attend {
  AttendStage stage;
  size_t plan;
};

using Stage = std::variant<EmbedStage, PackedEmbedStage, PositionStage, Project, Attend, MergeStage,
                           NormStage, RouteStage, AddStage>;

// Layers that are alike here share a plan.
struct PlanKey {
  int64_t heads, kv_heads, head_dim, window;
  bool causal;
  bool operator==(const PlanKey& other) const {
    return heads == other.heads && kv_heads == other.kv_heads && head_dim == other.head_dim &&
           window == other.window && causal == other.causal;
  }
};

}  // namespace sq_cpu
