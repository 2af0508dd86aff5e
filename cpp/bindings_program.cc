// Program, as a class of _core: it keeps the tensors that its stages point to.
#include <memory>

#include "bindings.h"
#include "sq_cpu/program.h"

namespace sq_cpu::bindings {
namespace {

using NormOfPython = std::tuple<Norm::Kind, py::object, py::object, double>;

class PyProgram {
 public:
  Buffer buffer(int64_t width) {
    widths_.push_back(width);
    return program_.buffer(width);
  }

  void embed(const py::object& table, double multiplier, Buffer out) {
    const std::vector<int64_t> shape = shape_of("table", table, 2);
    const std::optional<DType> type = float_type(table);
    SQ_CHECK(type && shape[1] == width(out), "table is ", describe(table), ", not floats of ",
             width(out), " columns");
    const auto* const data = array<const void>(
        "table", keep(table), Torch::get().dtypes[static_cast<size_t>(*type)].first,
        bounded_product(shape[0], shape[1]));
    program_.add(EmbedStage{data, *type, shape[0], static_cast<float>(multiplier), out});
  }

  void embed_packed(const py::object& packed, int64_t n, int64_t k, const py::object& quantizer,
                    double multiplier, Buffer out) {
    const PackedWeight weight{array<const std::byte>("the packed weight", keep(packed),
                                                     Torch::get().uint8, packed_bytes(n, k)),
                              n, k};
    const auto& own = keep(quantizer).cast<const Quantizer&>();
    program_.add(PackedEmbedStage{weight, own.view(k).inverse_smoothing,
                                  static_cast<float>(multiplier), out});
  }

  void position(const py::object& table, int64_t offset, Buffer out) {
    const std::vector<int64_t> shape = shape_of("the learned positions", table, 2);
    const auto* const data =
        array<const float>("the learned positions", keep(table), Torch::get().float32,
                           bounded_product(shape[0], width(out)));
    program_.add(PositionStage{data, shape[0], offset, out});
  }

  // `weight` is packed, uint8, or [n, k] in float, whose bias is `bias`.
  void project(Buffer in, int64_t column, const std::optional<NormOfPython>& norm,
               const py::object& quantizer, bool kept_rows,
               const std::vector<
                   std::tuple<py::object, py::object, int64_t, int64_t, Buffer, int64_t, Activation,
                              Buffer, bool, py::object, py::object, double, double>>& linears,
               int list, bool gather) {
    std::vector<ProjectedLinear> all;
    for (const auto& [matrix, bias, n, k, out, at, activation, other, accumulate, columns, weight,
                      multiplier, softcap] : linears) {
      ProjectedLinear linear{{nullptr, n, k},
                             out,
                             at,
                             activation,
                             other,
                             accumulate,
                             {},
                             static_cast<float>(multiplier),
                             static_cast<float>(softcap),
                             {}};
      SQ_CHECK(is_tensor(matrix), "the weight is ", describe(matrix));
      if (const std::optional<DType> type = float_type(matrix)) {
        SQ_CHECK(shape_of("the weight", matrix, 2)[0] == n && n > 0 && k > 0, "the weight is ",
                 describe(matrix), ", not [", n, ", ", k, "]");
        linear.in_float = {
            array<const void>("the weight", keep(matrix),
                              Torch::get().dtypes[static_cast<size_t>(*type)].first,
                              bounded_product(n, k)),
            *type, optional_array<const float>("a bias", keep(bias), Torch::get().float32, n)};
      } else {
        linear.weight.data = array<const std::byte>("the packed weight", keep(matrix),
                                                    Torch::get().uint8, packed_bytes(n, k));
      }
      if (!columns.is_none()) {
        const int64_t count = shape_of("columns", columns, 1)[0];
        linear.float_columns = {
            count, array<const int64_t>("columns", keep(columns), Torch::get().int64, count),
            array<const float>("the columns' weight", keep(weight), Torch::get().float32,
                               bounded_product(count, n))};
      }
      all.push_back(linear);
    }
    SQ_CHECK(!all.empty(), "a project stage has no linears");
    const int64_t k = all[0].weight.k;
    SQ_CHECK(!quantizer.is_none() || all[0].in_float.data != nullptr,
             "packed weights need a quantizer");
    ActivationQuantizer own;
    if (!quantizer.is_none()) own = keep(quantizer).cast<const Quantizer&>().view(k);
    program_.add(ProjectStage{in, column, norm_of(norm, k), own, kept_rows, all.data(),
                              static_cast<int>(all.size()), list, gather});
  }

  void attend(Buffer in, int64_t q, int64_t k, int64_t v, int64_t heads, int64_t kv_heads,
              int64_t head_dim, const std::optional<NormOfPython>& q_norm,
              const std::optional<NormOfPython>& k_norm, int rotary, int cache, double scale,
              int64_t window, double softcap, const py::object& slopes, const py::object& sinks,
              Buffer out, int64_t stride) {
    const Torch& torch = Torch::get();
    AttentionOptions options;
    options.scale = static_cast<float>(scale);
    options.window = window;
    options.softcap = static_cast<float>(softcap);
    options.slopes = optional_array<const float>("slopes", keep(slopes), torch.float32, heads);
    options.sinks = optional_array<const float>("sinks", keep(sinks), torch.float32, heads);
    program_.add(AttendStage{in, q, k, v, heads, norm_of(q_norm, head_dim),
                             norm_of(k_norm, head_dim), rotary, cache, kv_heads, head_dim, options,
                             out, stride});
  }

  void merge(Buffer in, const NormOfPython& norm, Buffer out) {
    program_.add(MergeStage{in, norm_of(norm, width(in)), out});
  }

  void route(Buffer in, const std::optional<NormOfPython>& norm, const py::object& weight,
             int64_t top, bool renormalize, Buffer zero) {
    const std::vector<int64_t> shape = shape_of("the router", weight, 2);
    const std::optional<DType> type = float_type(weight);
    SQ_CHECK(type, "the router is ", describe(weight), ", not of floats");
    const FloatWeight router{
        array<const void>("the router", keep(weight),
                          Torch::get().dtypes[static_cast<size_t>(*type)].first,
                          bounded_product(shape[0], shape[1])),
        *type};
    program_.add(RouteStage{in, 0, norm_of(norm, shape[1]), router, shape[0], shape[1], top,
                            renormalize, zero});
  }

  void add(Buffer in, int list, Buffer gate, Buffer out) {
    program_.add(AddStage{in, list, gate, out});
  }

  void norm(Buffer buffer, int64_t column, int64_t columns, const NormOfPython& norm) {
    program_.add(NormStage{buffer, column, columns, norm_of(norm, columns)});
  }

  void result(Buffer buffer) {
    program_.set_result(buffer);
    result_ = buffer;
  }

  // The pages of each cache, [pages, kv heads, bytes], with the size of its heads, their type, and
  // which of the page tables of a call is its.
  void set_caches(const std::vector<std::tuple<py::object, int64_t, KvType, int64_t>>& caches) {
    check_idle();
    std::vector<KvCache> all;
    std::vector<int64_t> groups;
    for (const auto& [pages, head_dim, type, group] : caches) {
      SQ_CHECK(group >= 0, "table ", group);
      groups.push_back(group);
      const std::vector<int64_t> shape = shape_of("pages", pages, 3);
      SQ_CHECK(shape[2] == page_bytes(head_dim, type), "pages are of ", shape[2], " bytes, not ",
               page_bytes(head_dim, type));
      all.push_back({array<std::byte>("pages", pages, Torch::get().uint8,
                                      bounded_product(shape[0], shape[1], shape[2])),
                     shape[0], shape[1], head_dim, type});
    }
    caches_ = std::move(all);
    groups_ = std::move(groups);
    kept_caches_ = py::cast(caches);
  }

  // Of each: [positions, 2, rotated] and whether pairs are interleaved.
  void set_rotaries(const std::vector<std::pair<py::object, bool>>& rotaries) {
    check_idle();
    std::vector<Rotary> all;
    for (const auto& [table, interleaved] : rotaries) {
      const std::vector<int64_t> shape = shape_of("the rotary table", table, 3);
      SQ_CHECK(shape[1] == 2, "the rotary table is ", describe(table), ", not of cos and sin");
      all.push_back({array<const float>("the rotary table", table, Torch::get().float32,
                                        bounded_product(shape[0], 2, shape[2])),
                     shape[0], shape[2], interleaved});
    }
    rotaries_ = std::move(all);
    kept_rotaries_ = py::cast(rotaries);
  }

  void run(const py::object& ids, const py::object& positions, const py::object& first_row,
           const py::object& length, const py::object& table, const py::object& kept,
           const py::object& result, int threads) {
    const Torch& torch = Torch::get();
    const int64_t rows = shape_of("ids", ids, 1)[0], wanted = shape_of("kept", kept, 1)[0];
    const std::vector<int64_t> shape = shape_of("table", table, 3);
    const int64_t count = shape[1];
    const auto* const pages = array<const int32_t>("table", table, torch.int32,
                                                   bounded_product(shape[0], count, shape[2]));
    std::vector<const int32_t*> tables;
    for (const int64_t group : groups_) {
      SQ_CHECK(group < shape[0], "a cache has table ", group, " of ", shape[0]);
      tables.push_back(pages + group * count * shape[2]);
    }
    SQ_CHECK(result_ != kNoBuffer, "the program has no result");
    const auto* const rows_of =
        array<const int64_t>("first_row", first_row, torch.int64, count + 1);
    SQ_CHECK(rows_of[count] == rows, "first_row ends with ", rows_of[count], ", not ", rows);
    const Step step{
        array<const int64_t>("ids", ids, torch.int64, rows),
        array<const int64_t>("positions", positions, torch.int64, rows),
        {count, rows_of, array<const int64_t>("length", length, torch.int64, count), pages,
         shape[2]},
        caches_.data(),
        static_cast<int>(caches_.size()),
        tables.data(),
        rotaries_.data(),
        static_cast<int>(rotaries_.size()),
        array<const int64_t>("kept", kept, torch.int64, wanted),
        wanted,
        array<float>("result", result, torch.float32, bounded_product(wanted, width(result_)))};
    check_idle();
    const Running running(running_);
    const Door door;
    program_.run(step, threads);
  }

 private:
  // Read and written under the GIL.
  struct Running {
    explicit Running(bool& flag) : flag_(flag) { flag_ = true; }
    Running(const Running&) = delete;
    ~Running() { flag_ = false; }
    bool& flag_;
  };
  void check_idle() const { SQ_CHECK(!running_, "the program runs already, in another thread"); }

  const py::object& keep(const py::object& tensor) {
    kept_.push_back(tensor);
    return kept_.back();
  }

  int64_t width(Buffer buffer) const {
    SQ_CHECK(buffer >= 0 && buffer < static_cast<Buffer>(widths_.size()), "no buffer ", buffer);
    return widths_[static_cast<size_t>(buffer)];
  }

  Norm norm_of(const std::optional<NormOfPython>& norm, int64_t k) {
    if (!norm) return {};
    const auto& [kind, weight, bias, eps] = *norm;
    const Torch& torch = Torch::get();
    return {kind, optional_array<const float>("a norm's weight", keep(weight), torch.float32, k),
            optional_array<const float>("a norm's bias", keep(bias), torch.float32, k),
            static_cast<float>(eps)};
  }

  Program program_;
  bool running_ = false;
  std::vector<int64_t> widths_;
  Buffer result_ = kNoBuffer;
  std::vector<py::object> kept_;
  std::vector<KvCache> caches_;
  std::vector<int64_t> groups_;
  std::vector<Rotary> rotaries_;
  py::object kept_caches_, kept_rotaries_;
};

}  // namespace

void define_program(py::module_& m) {
  py::enum_<Norm::Kind>(m, "NormKind")
      .value("rms", Norm::Kind::kRms)
      .value("layer", Norm::Kind::kLayer);

  py::class_<PyProgram>(m, "Program")
      .def(py::init<>())
      .def("buffer", &PyProgram::buffer, py::arg("width"))
      .def("embed", &PyProgram::embed, py::arg("table"), py::arg("multiplier"), py::arg("out"))
      .def("embed_packed", &PyProgram::embed_packed, py::arg("packed"), py::arg("n"), py::arg("k"),
           py::arg("quantizer"), py::arg("multiplier"), py::arg("out"))
      .def("position", &PyProgram::position, py::arg("table"), py::arg("offset"), py::arg("out"))
      .def("project", &PyProgram::project, py::arg("in_buffer"), py::arg("column"), py::arg("norm"),
           py::arg("quantizer"), py::arg("kept_rows"), py::arg("linears"), py::arg("row_list"),
           py::arg("gather"))
      .def("route", &PyProgram::route, py::arg("in_buffer"), py::arg("norm"), py::arg("weight"),
           py::arg("top"), py::arg("renormalize"), py::arg("zero"))
      .def("add", &PyProgram::add, py::arg("in_buffer"), py::arg("row_list"), py::arg("gate"),
           py::arg("out"))
      .def("attend", &PyProgram::attend, py::arg("in_buffer"), py::arg("q"), py::arg("k"),
           py::arg("v"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
           py::arg("q_norm"), py::arg("k_norm"), py::arg("rotary"), py::arg("cache"),
           py::arg("scale"), py::arg("window"), py::arg("softcap"), py::arg("slopes"),
           py::arg("sinks"), py::arg("out"), py::arg("stride"))
      .def("merge", &PyProgram::merge, py::arg("in_buffer"), py::arg("norm"), py::arg("out"))
      .def("norm", &PyProgram::norm, py::arg("buffer"), py::arg("column"), py::arg("columns"),
           py::arg("norm"))
      .def("result", &PyProgram::result, py::arg("buffer"))
      .def("set_caches", &PyProgram::set_caches, py::arg("caches"))
      .def("set_rotaries", &PyProgram::set_rotaries, py::arg("rotaries"))
      .def("run", &PyProgram::run, py::arg("ids"), py::arg("positions"), py::arg("first_row"),
           py::arg("length"), py::arg("table"), py::arg("kept"), py::arg("result"),
           py::arg("threads"));
}

}  // namespace sq_cpu::bindings
