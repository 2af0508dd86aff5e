#include "dispatch.h"

#include <iterator>

#include "blocking.h"
#include "testing/use_isa.h"

namespace sq_cpu {
namespace {

constexpr Microkernel kMicrokernels[] = {
#define SQ_MICROKERNEL(isa, name, rows, strips, max_code, from_m, home, overlaps, begin, end) \
  {#name, Isa::isa, rows, strips, max_code, from_m, PanelHome::home, overlaps, name, begin, end},
#define SQ_ROW_KERNELS(isa, name)
#include "kernels.inc"
#undef SQ_MICROKERNEL
#undef SQ_ROW_KERNELS
};

// What every array that the table sizes can hold; a row that does not fit does not compile.
constexpr bool fits(const Microkernel& kernel) {
  return kernel.rows >= 1 && kernel.rows <= kMaxRows && kernel.strips >= 1 &&
         kernel.strips * kStripColumns <= kMaxColumns;
}

// Groups that begin within a block of codes end there, or are whole blocks.
constexpr bool keeps_to_blocks(const Microkernel& kernel) {
  return kernel.rows <= kBlockRows || kernel.rows % kBlockRows == 0;
}

// A group may hold whole pairs of rows, the two terms of a row of x.
constexpr bool takes_pairs(const Microkernel& kernel) { return kernel.rows % 2 == 0; }

// A product asks for codes up to 127 or up to 255.
constexpr bool can_be_chosen(const Microkernel& kernel) {
  return (kernel.max_code == 127 || kernel.max_code == 255) && kernel.from_m >= 1;
}

template <typename Holds>
constexpr bool all_rows(Holds holds) {
  for (const Microkernel& kernel : kMicrokernels) {
    if (!holds(kernel)) return false;
  }
  return true;
}

// Every ISA's kernels follow those of the ISAs before it, so that the last that may run is best.
constexpr bool worst_first() {
  for (size_t i = 1; i < std::size(kMicrokernels); ++i) {
    if (kMicrokernels[i].isa < kMicrokernels[i - 1].isa) return false;
  }
  return true;
}

static_assert(all_rows(fits), "kernels.inc: a microkernel exceeds kMaxRows or kMaxColumns");
static_assert(all_rows(keeps_to_blocks),
              "kernels.inc: rows beyond a block of codes must be blocks");
static_assert(all_rows(takes_pairs), "kernels.inc: rows must be even");
static_assert(all_rows(can_be_chosen), "kernels.inc: codes are up to 127 or 255, from_m 1 or more");
static_assert(all_rows([](const Microkernel& k) { return kMostRows % row_step(k) == 0; }),
              "kernels.inc: kMostRows must be whole groups of every microkernel");
static_assert(all_rows([](const Microkernel& k) {
                return most_groups(k, kMostRows) <= kMostGroups;
              }),
              "kernels.inc: a row block of this microkernel has more than kMostGroups groups");
static_assert(worst_first(), "kernels.inc: rows must stand in the order of Isa");
static_assert(kMicrokernels[0].isa == Isa::kReference && kMicrokernels[0].max_code == 255 &&
                  kMicrokernels[0].from_m == 1,
              "kernels.inc: the first row runs everywhere, for any codes and rows");

struct RowKernelsOf {
  Isa isa;
  const RowKernels& kernels;
};

const RowKernelsOf kRowKernels[] = {
#define SQ_MICROKERNEL(...)
#define SQ_ROW_KERNELS(isa, name) {Isa::isa, name},
#include "kernels.inc"
#undef SQ_MICROKERNEL
#undef SQ_ROW_KERNELS
};

// An ISA may use the kernels of those before it that this machine has: an emulated one stands
// alone.
bool may_run(Isa kernel, Isa isa) {
  return kernel == isa || (kernel < isa && isa_status()[static_cast<size_t>(kernel)].usable());
}

}  // namespace

MicrokernelTable microkernels() { return {kMicrokernels, std::size(kMicrokernels)}; }

const Microkernel& choose_microkernel(Isa isa, int max_code, int64_t m) {
  const Microkernel* best = &kMicrokernels[0];
  for (const Microkernel& kernel : kMicrokernels) {
    if (may_run(kernel.isa, isa) && kernel.max_code >= max_code && m >= kernel.from_m)
      best = &kernel;
  }
  return *best;
}

const char* microkernel_name(int max_code, int64_t m) {
  return choose_microkernel(active_isa(), max_code, m).name;
}

const RowKernels& row_kernels(Isa isa) {
  const RowKernels* best = &kRowKernels[0].kernels;
  for (const RowKernelsOf& row : kRowKernels) {
    if (may_run(row.isa, isa)) best = &row.kernels;
  }
  return *best;
}

}  // namespace sq_cpu
