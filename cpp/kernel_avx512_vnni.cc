// AVX512-VNNI: one VPDPBUSD a step, exact for any codes.
#include "avx512.h"

namespace sq_cpu {
namespace {

struct Vpdpbusd {
  __m512i operator()(__m512i sum, __m512i codes, __m512i weights) const {
    return _mm512_dpbusd_epi32(sum, codes, weights);
  }
};

}  // namespace

void u8s8_6x64_avx512_vnni(const TileArgs& t) {
  run_block<Vpdpbusd, u8s8_6x64_avx512_vnni_block>(t);
}

}  // namespace sq_cpu
