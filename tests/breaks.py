"""What test_mutations.py does to the C++ sources: a row a break, at least one a kernel file and a
stage of the driver, and a row for each array that a new kernel or type may not fit.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Break:
    name: str
    file: str
    text: str
    replacement: str
    noticed_by: str
    isa: str | None = None  # what runs the broken code; None: any machine


BREAKS = [
    Break(
        "reference: k order",
        "cpp/kernel_reference.cc",
        "column * 4 + k % 4;",
        "column * 4 + 3 - k % 4;",
        "test_kernels",
    ),
    Break(
        "avx2: sign of odd weights",
        "cpp/kernel_avx2.cc",
        "odd[half] = _mm256_srai_epi16(bytes, 8);",
        "odd[half] = _mm256_srli_epi16(bytes, 8);",
        "test_kernels",
        "avx2",
    ),
    Break(
        "avx512bw: sign of odd weights",
        "cpp/kernel_avx512bw.cc",
        "odd_weights = _mm512_srai_epi16(weights, 8);",
        "odd_weights = _mm512_srli_epi16(weights, 8);",
        "test_kernels",
        "avx512bw",
    ),
    Break(
        "avx512_vnni: which operand is unsigned",
        "cpp/kernel_avx512_vnni.cc",
        "_mm512_dpbusd_epi32(sum, codes, weights)",
        "_mm512_dpbusd_epi32(sum, weights, codes)",
        "test_kernels",
        "avx512_vnni",
    ),
    Break(
        "amx_int8: a tile stored twice",
        "cpp/kernel_amx_int8.cc",
        "TILE_STORE(3, c[3], c_stride);",
        "TILE_STORE(2, c[3], c_stride);",
        "test_kernels",
        "amx_int8",
    ),
    Break(
        "epilogue: zero-point sign",
        "cpp/rows.h",
        "(load_bits<U32>(c) - at.correction[term])",
        "(load_bits<U32>(c) + at.correction[term])",
        "test_kernels",
    ),
    Break(
        "epilogue: the second term's scale",
        "cpp/rows.h",
        "at.scale() * args.row_scale[row + term];",
        "at.scale() * args.row_scale[row];",
        "test_linear",
    ),
    Break(
        "quantize: what the first term leaves over",
        "cpp/rows.h",
        "rest(fma(biased - 0x1.8p23f, minus_scale, v))",
        "rest(fma(biased - 0x1.8p23f, -minus_scale, v))",
        "test_linear",
    ),
    Break(
        "quantize: the extremes of what it measures",
        "cpp/rows.h",
        "    measure(v, turn);\n    store_bits(",
        "    measure(v * 0.9f, turn);\n    store_bits(",
        "test_linear",
    ),
    Break(
        "quantize: the last code that does not clip",
        "cpp/quantize.cc",
        "high > grid.high) return",
        "high >= grid.high) return",
        "test_linear",
    ),
    Break(
        "quantize: the first code that underflows",
        "cpp/quantize.cc",
        "return 8 * span < static",
        "return 8 * span <= static",
        "test_linear",
    ),
    Break(
        "quantize: a row of zeros keeps the static scale",
        "cpp/quantize.cc",
        "(stats.min == 0.0f && stats.max == 0.0f)",
        "stats.min > stats.max",
        "test_linear",
    ),
    Break(
        "quantize: the scale of a row of its own",
        "cpp/quantize.cc",
        "falls_back ? own_code(q, own)",
        "falls_back ? make_code(q, own)",
        "test_linear",
    ),
    Break(
        "ops: rows that each worker codes for itself count once",
        "cpp/ops.cc",
        "if (worker == 0) count_rows",
        "if (worker >= 0) count_rows",
        "test_threads",
    ),
    Break(
        "ops: codes that a product wrote are chained",
        "cpp/ops.cc",
        "counts.chained = m;",
        "counts.rows = m;",
        "test_linear",
    ),
    Break(
        "program: rows that each worker codes for itself count once",
        "cpp/run_program.cc",
        "if (!alone || worker_ == 0) count_rows",
        "if (!alone || worker_ >= 0) count_rows",
        "test_program",
    ),
    Break(
        "rotation: the sign of a butterfly between vectors",
        "cpp/hadamard.h",
        "v[i + kHalf] = a - b;",
        "v[i + kHalf] = b - a;",
        "test_linear",
    ),
    Break(
        "rotation: zeros beyond the last column",
        "cpp/rows.h",
        "i < row.k ? tail(i) : F32{};",
        "i < row.k ? tail(i) : splat(1.0f);",
        "test_linear",
    ),
    Break(
        "gathered rows: the column of a strip",
        "cpp/rows.h",
        "row.strip + 4 * row.column;",
        "row.strip + row.column;",
        "test_linear",
    ),
    Break(
        "groups: pairs of terms",
        "cpp/blocking.h",
        "const Range group = part(size, step, parts, index);",
        "const Range group = part(size, step > 2 ? step : 1, parts, index);",
        "test_linear",
    ),
    Break(
        "epilogue: tail mask",
        "cpp/vec.h",
        "std::memcpy(y, &value, count * (sizeof value / kLanes));",
        "std::memcpy(y, &value, (count + 1) * (sizeof value / kLanes));",
        "test_kernels",
    ),
    Break(
        "strips: K padding",
        "cpp/strips.h",
        "if (columns == kStripColumns && depth == kTileDepth) {",
        "if (columns == kStripColumns) {",
        "test_kernels",
    ),
    Break(
        "pack: column sums",
        "cpp/pack.cc",
        "columns, k, strip, true});",
        "columns, k, strip, false});",
        "test_kernels",
    ),
    Break(
        "dispatch: fewest rows",
        "cpp/dispatch.cc",
        "m >= kernel.from_m",
        "m > kernel.from_m",
        "test_blocking",
    ),
    Break(
        "blocking: rows in whole groups",
        "cpp/blocking.cc",
        "best.rows = near_equal(rows, step, kMostRows);",
        "best.rows = near_equal(rows, 1, kMostRows);",
        "test_blocking",
    ),
    Break(
        "gemm: sums of the k blocks before",
        "cpp/gemm.cc",
        "tile.accumulate = cut > 0;",
        "tile.accumulate = false;",
        "test_kernels",
    ),
    Break(
        "gemm: tasks that nobody came for",
        "cpp/gemm.cc",
        "const int64_t task = (thread + i) % tasks;",
        "const int64_t task = thread % tasks;",
        "test_kernels",
    ),
    Break(
        "quantize: zero point of the symmetric grid",
        "cpp/quantize.cc",
        "code.grid.zero_point = absmax_code + 1;",
        "code.grid.zero_point = absmax_code;",
        "test_linear",
    ),
    Break(
        "ops: rows of the residual",
        "cpp/ops.cc",
        "steps.ld_residual = epilogue.ld_residual;",
        "steps.ld_residual = epilogue.ld_other;",
        "test_linear",
    ),
    Break(
        "batched_matmul: rows of a head",
        "cpp/batched_matmul.cc",
        "row % job_.shape.m * strides.row;",
        "row % job_.shape.m * strides.head;",
        "test_batched_matmul",
    ),
    Break(
        "softmax: the weights carried over",
        "cpp/softmax.h",
        "a.total[row] * carry + tree_sum(sums)",
        "a.total[row] + tree_sum(sums)",
        "test_attention",
    ),
    Break(
        "softmax: values beyond what a row sees",
        "cpp/softmax.h",
        "s[i] = see(i, p * load_bits<F32>(a.value_scale + i * kLanes), 0.0f);",
        "s[i] = p * load_bits<F32>(a.value_scale + i * kLanes);",
        "test_attention",
    ),
    Break(
        "page products: tokens that a row does not see",
        "cpp/page_products.h",
        "token < a.last[row]; ++token",
        "token < kPageTokens; ++token",
        "test_attention",
    ),
    Break(
        "attention: the window's end",
        "cpp/attention.cc",
        "position + 1 - options.window",
        "position - options.window",
        "test_attention",
    ),
    Break(
        "append: a page that two write",
        "cpp/kv_page.cc",
        "SQ_CHECK(twice == pages.end(),",
        "SQ_CHECK(true,",
        "test_attention",
    ),
    Break(
        "append: rows that descend",
        "cpp/kv_page.cc",
        "SQ_CHECK(begin <= end,",
        "SQ_CHECK(true,",
        "test_attention",
    ),
    Break(
        "attention: the offset of q's codes",
        "cpp/kv_page.cc",
        "slot, 128 * sum);",
        "slot, 127 * sum);",
        "test_attention",
    ),
    Break(
        "program: where heads that lie side by side begin",
        "cpp/kv_page.h",
        "head / transform.group * transform.gap",
        "head * transform.gap",
        "test_program",
    ),
    Break(
        "step: where buffers of several rows lie",
        "cpp/step_plan.cc",
        "next += rows * whole_vectors(width);",
        "next += whole_vectors(width);",
        "test_program",
    ),
    Break(
        "float product: what is left of k",
        "cpp/float_product.h",
        "if (at < a.k) add(",
        "if (at + kLanes <= a.k) add(",
        "test_program",
    ),
    Break(
        "route: whose weight it is",
        "cpp/route.h",
        "weight_.get(0)[to] = chosen_weight_.get(0)[i];",
        "weight_.get(0)[to] = chosen_weight_.get(0)[to];",
        "test_program",
    ),
    Break(
        "activations: the slope of the cap",
        "cpp/activations.h",
        "kScale = -0x1.715476p+1f;",
        "kScale = -0x1.715476p+0f;",
        "test_program",
    ),
    Break(
        "team: a region of a part of the pool",
        "cpp/team.h",
        "#pragma omp parallel\n",
        "#pragma omp parallel num_threads(workers)\n",
        "test_threads",
    ),
    Break(
        "operands: a type beyond its tables",
        "cpp/operands.h",
        "SQ_CHECK(is_one_of(type, DType::kFloat16), name,",
        "SQ_CHECK(true, name,",
        "test_hostile",
    ),
    Break(
        "pack: a size that overflows",
        "cpp/pack.cc",
        "SQ_CHECK(bounded_product(n, strip_bytes(k)) <= kMostBytes,",
        "SQ_CHECK(true,",
        "test_hostile",
    ),
    Break(
        "batched_matmul: strides that overlap",
        "cpp/operands.h",
        "SQ_CHECK(stride >= width,",
        "SQ_CHECK(true,",
        "test_batched_matmul",
    ),
    Break(
        "team: a forked child",
        "cpp/team.cc",
        "return g_forked || omp_in_parallel()",
        "return omp_in_parallel()",
        "test_threads",
    ),
]


@dataclass(frozen=True)
class Misfit:
    """A row of the kernel table, or a type, that some array has no room for."""

    name: str
    file: str
    text: str
    replacement: str
    compiled: str
    error: str


MISFITS = [
    Misfit(
        "more rows than kMaxRows",
        "cpp/kernels.inc",
        "u8s8_32x32_amx_int8,         32,",
        "u8s8_32x32_amx_int8,         64,",
        "cpp/dispatch.cc",
        "exceeds kMaxRows or kMaxColumns",
    ),
    Misfit(
        "more columns than kMaxColumns",
        "cpp/kernels.inc",
        "u8s8_6x64_avx512_vnni,        6,  4,",
        "u8s8_6x64_avx512_vnni,        4,  5,",
        "cpp/dispatch.cc",
        "exceeds kMaxRows or kMaxColumns",
    ),
    Misfit(
        "more groups than kMostGroups",
        "cpp/kernels.inc",
        "u7s8_4x16_avx2,               4,",
        "u7s8_4x16_avx2,               2,",
        "cpp/dispatch.cc",
        "more than kMostGroups groups",
    ),
    Misfit(
        "groups across blocks of codes",
        "cpp/kernels.inc",
        "u8s8_32x32_amx_int8,         32,",
        "u8s8_32x32_amx_int8,         24,",
        "cpp/dispatch.cc",
        "rows beyond a block of codes must be blocks",
    ),
    Misfit(
        "an ISA before its time",
        "cpp/kernels.inc",
        "SQ_MICROKERNEL(kAvx2,       u7s8_4x16_avx2,",
        "SQ_MICROKERNEL(kReference,  u7s8_4x16_avx2,",
        "cpp/dispatch.cc",
        "rows must stand in the order of Isa",
    ),
    Misfit(
        "more sums than registers",
        "cpp/kernels.inc",
        "u8s8_6x64_avx512_vnni,        6,  4,",
        "u8s8_6x64_avx512_vnni,        8,  4,",
        "cpp/kernel_avx512_vnni.cc",
        "leave no registers",
    ),
    Misfit(
        "a register block that AVX2 has no function for",
        "cpp/kernels.inc",
        "u8s8_4x16_avx2,               4,",
        "u8s8_4x16_avx2,               6,",
        "cpp/kernel_avx2.cc",
        "does not fit AVX2",
    ),
    Misfit(
        "a DType that no RowKernels has",
        "cpp/include/sq_cpu/linear.h",
        "enum class DType { kFloat32, kBFloat16, kFloat16 };",
        "enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };",
        "cpp/dispatch.cc",
        "a function for each DType",
    ),
    Misfit(
        "an Output that no RowKernels has",
        "cpp/kernel.h",
        "kCode, kInt8 };",
        "kCode, kInt16, kInt8 };",
        "cpp/dispatch.cc",
        "a function for each DType and each Output",
    ),
]
