// y = x W^T + b over packed codes: for one weight, or for groups of rows with a weight each.
#include "coded_panel.h"

namespace kvrun {
namespace {

enum Arithmetic { kFloat32, kBfloat16, kRounded };

// The sum of each group of a row's inputs, in an order of its own.
template <class T>
void total(const Call& call, const T* row, int height, float* totals) {
  constexpr int lanes = Floats::width;
  for (int64_t g = 0; g < call.groups(); g++) {
    const int64_t end = (g + 1) * call.group < call.inputs ? (g + 1) * call.group : call.inputs;
    Floats all = Floats::zero();
    for (int64_t k = g * call.group; k < end; k += lanes)
      all = all + (end - k >= lanes ? Floats::load(row + k) : Floats::load(row + k, end - k));
    totals[g * height] = sum(all);
  }
}

// A row in 8 bits, group by group: its largest magnitude is 127 steps.
template <class S, class T>
void round_row(const Call& call, const T* row, int height, uint32_t* to, const Totals& totals) {
  constexpr int lanes = Floats::width;
  for (int64_t g = 0; g < call.groups(); g++) {
    const int64_t begin = g * call.group, end = call.group_end(g), last = end < call.inputs ? end : call.inputs;
    Floats most = Floats::zero();
    float x[kBlock];
    for (int64_t k = begin; k < end; k += lanes) {
      const int64_t there = last - k < lanes ? (last > k ? last - k : 0) : lanes;
      const Floats value = there == lanes ? Floats::load(row + k) : Floats::load(row + k, there);
      most = max(most, abs(value));
      value.store(x + (k - begin), end - k < lanes ? end - k : lanes);
    }
    const float top = largest(most), inverse = top > 0 ? 127.0f / top : 0;
    int32_t all = 0;
    int8_t codes[kBlock];
    for (int64_t k = 0; k < end - begin; k++) {
      codes[k] = int8_t(__builtin_rintf(x[k] * inverse));
      all += codes[k];
    }
    for (int64_t k = 0; k < end - begin; k += 4) {
      int8_t bytes[4];
      for (int i = 0; i < 4; i++) bytes[i] = codes[k - k % S::inputs + S::order[k % S::inputs + i]];
      memcpy(to + (begin + k) / 4 * height, bytes, 4);
    }
    totals.steps[g * height] = top / 127.0f;
    totals.inputs[g * height] = float(all) * totals.steps[g * height];
    totals.starts[g * height] = -call.zero() * all;
  }
}

// A product as runs.h shares it: how a load multiplies, and the type of x.
template <class S, class T>
struct Coded : Call {
  using X = typename S::X;
  static constexpr int64_t kInputs = 2048;  // of a piece

  static int panels_at_once(int height) { return kvrun::panels_at_once(height); }
  int64_t panel_count() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t factors() const { return padded() / S::inputs * S::factors; }
  int64_t across() const { return (padded() + kInputs - 1) / kInputs; }
  int64_t bytes(const Rows& rows) const {
    return rows.count * (factors() * sizeof(X) + groups() * (2 * sizeof(float) + sizeof(int32_t)));
  }
  int64_t pieces(const Rows& rows) const { return rows.tiles * across(); }

  Totals totals(const Rows& rows, void* laid) const {
    const int64_t count = rows.count * groups();
    float* tables = (float*)((X*)laid + rows.count * factors());
    return {tables, tables + count, (int32_t*)(tables + 2 * count)};
  }

  void prepare(const Rows& rows, void* laid, int64_t piece) const {
    const int64_t t = piece / across(), first = piece % across() * kInputs;
    const int64_t last = first + kInputs < padded() ? first + kInputs : padded();
    const T* from = (const T*)x + rows.begin(t) * stride;
    const int height = rows.height(t);
    const Totals mine = totals(rows, laid).from(rows.begin(t) * groups());
    X* to = (X*)laid + rows.begin(t) * factors();
    if constexpr (S::rounds) {
      for (int r = 0; r < height && first == 0; r++) round_row<S>(*this, from + r * stride, height, to + r, mine.from(r));
    } else {
      lay_out<kRows>(to, from, stride, height, first, last, inputs);
      for (int r = 0; r < height && offset_dtype != kNone && first == 0; r++)
        total(*this, from + r * stride, height, mine.inputs + r);
    }
  }

  void multiply(const Rows& rows, void* laid, Span across, Span down) const {
    const auto run = [&](const Call& call) {
      kvrun::multiply<S>(call, rows, (const X*)laid, totals(rows, laid), across, down);
    };
    if constexpr (S::halves) {
      // The upper halves of float32, twice: the look-up reads five bits.
      uint16_t table_halves[32];
      for (int i = 0; i < 32; i++) table_halves[i] = uint16_t(float_to_bits(table[i % 16]) >> 16);
      Call call = *this;
      call.table = (const float*)table_halves;
      run(call);
    } else {
      run(*this);
    }
  }
};

// Rows bounds[g] to bounds[g + 1] of x with weights[g].
struct Groups {
  Call shape;
  const Weight* weights;
  const int64_t* bounds;
  int64_t count;
};

template <class S, class T>
void run_all(const Groups& groups) {
  multiply_groups(groups.bounds, groups.count, kSlab, kRows, [&](int64_t g, int64_t row) {
    Coded<S, T> product{groups.shape};
    static_cast<Weight&>(product) = groups.weights[g];
    product.x = (const T*)product.x + row * product.stride;
    product.out = (T*)product.out + row * product.outputs;
    return product;
  });
}

// x in 8 bits.
void run_rounded(const Groups& groups) {
  const bool nibbles = groups.shape.form == kNibbles;
  with_dtype(groups.shape.out_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
#if defined(__AVX512F__)
    if (has_vnni()) return nibbles ? run_all<NibbleQuads<true>, T>(groups) : run_all<Int8Quads<true>, T>(groups);
#endif
    nibbles ? run_all<NibbleQuads<false>, T>(groups) : run_all<Int8Quads<false>, T>(groups);
  });
}

void run(const Groups& groups, int64_t arithmetic) {
  const int64_t form = groups.shape.form, dtype = groups.shape.out_dtype;
  if (arithmetic == kRounded) return run_rounded(groups);
#if defined(__AVX512BF16__)
  if (dtype == 1 && arithmetic == kBfloat16) {
    if (form == kNibbles) return run_all<NibblesDot, Bfloat16>(groups);
    if (form == kInt8) return run_all<Int8Dot, Bfloat16>(groups);
  }
#endif
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (form == kNibbles) return run_all<Nibbles, T>(groups);
    if (form == kInt8) return run_all<Int8, T>(groups);
    run_all<Float8, T>(groups);
  });
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(quantized_linear)
(void* out, const void* x, const void* panels, const void* scales, const void* offsets, const void* table,
 const void* units, const void* bias, int64_t rows, int64_t outputs, int64_t inputs, int64_t stride, int64_t group, int64_t form,
 int64_t scale_dtype, int64_t offset_dtype, int64_t block, int64_t x_dtype, int64_t bias_dtype, int64_t arithmetic) {
  using namespace kvrun;
  const Weight weight{(const uint8_t*)panels, scales, offsets, (const float*)table, (const Float16*)units, bias};
  const Call shape{{}, out, x, outputs, inputs, stride, group, form, scale_dtype, offset_dtype, block, x_dtype, bias_dtype};
  const int64_t bounds[] = {0, rows};
  run({shape, &weight, bounds, 1}, arithmetic);
}

KVRUN_OP(grouped_quantized_linear)
(void* out, const void* x, const void* weights, const void* bounds, int64_t count, int64_t outputs, int64_t inputs, int64_t stride,
 int64_t group, int64_t form, int64_t scale_dtype, int64_t offset_dtype, int64_t block, int64_t x_dtype, int64_t bias_dtype,
 int64_t arithmetic) {
  using namespace kvrun;
  const Call shape{{}, out, x, outputs, inputs, stride, group, form, scale_dtype, offset_dtype, block, x_dtype, bias_dtype};
  run({shape, (const Weight*)weights, (const int64_t*)bounds, count}, arithmetic);
}
