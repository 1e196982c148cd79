// Plain numbers as codes of 4 or 8 bits with scales; op.py says what each scheme computes.
#include "stored_rows.h"
#include "thread_pool.h"

namespace kvrun {
namespace {

enum Kind { kInt8, kFloat8, kInt4, kTable };

constexpr float kSmallest = 1e-12f;  // as in op.py
constexpr int kEntries = 16;         // of a table

// The nearest whole number, of two the even one, for magnitudes below 2^22: adding 1.5 * 2^23 rounds.
inline Floats whole(Floats x) {
  const Floats magic(12582912.0f);
  return (x + magic) - magic;
}

inline Floats between(Floats x, float least, float most) {
  return x.raw > most ? Floats(most).raw : x.raw < least ? Floats(least).raw : x.raw;
}

inline CodeLanes to_codes(Floats whole_numbers) {
  return to_bytes((Floats::Words)__builtin_convertvector(whole_numbers.raw, Floats::Ints));
}

// Numbers that share a scale. Lanes beyond their end are zeros, which change no largest magnitude.
template <class T>
struct Group {
  const T* from;
  int64_t count;

  float largest_magnitude() const {
    Floats most = Floats::zero();
    by_vectors(count, [&](int64_t i, int64_t n) { most = max(abs(load_floats(from + i, n)), most); });
    return largest(most);
  }

  // Stores what `code` makes of each vector.
  template <class F>
  void store(char* to, const F& code) const {
    by_vectors(count, [&](int64_t i, int64_t n) { store_codes(to + i, code(load_floats(from + i, n)), n); });
  }
};

// One scale for a row: its largest magnitude is `levels` steps.
template <bool floats>
struct ByRow {
  using Scale = float;
  float levels;

  template <class T>
  void operator()(Group<T> group, char* codes, float* scale) const {
    const float most = group.largest_magnitude();
    *scale = (most > kSmallest ? most : kSmallest) / levels;
    const Floats step(*scale);
    group.store(codes, [&](Floats x) {
      if constexpr (floats) return Float8E4m3::from(x / step);
      return to_codes(between(whole(x / step), -128, 127));
    });
  }
};

// -8 to 7, of which the group's largest number is -8; its scale is rounded to 16 bits first.
struct BySteps {
  using Scale = Float16;

  template <class T>
  void operator()(Group<T> group, char* codes, Float16* scale) const {
    Floats most = Floats::zero(), least = Floats::zero();  // the latter with its sign turned
    by_vectors(group.count, [&](int64_t i, int64_t n) {
      const Floats x = load_floats(group.from + i, n);
      most = max(x, most);
      least = max(Floats::zero() - x, least);
    });
    const float above = largest(most), below = largest(least);
    Float16 held[Floats::width];
    Floats((above > below ? above : 0.0f - below) / -8.0f).store(held);
    *scale = held[0];
    const Floats rounded = Floats::load(held), step = rounded.raw == 0.0f ? Floats(1.0f).raw : rounded.raw;
    group.store(codes, [&](Floats x) { return to_codes(between(whole(x / step), -8, 7) + Floats(8.0f)); });
  }
};

// The nearest entry of a table to each number's share of the largest magnitude.
struct ByTable {
  using Scale = float;
  const float* middles;  // between entries, from the least
  const int32_t* steps;  // the code of the least entry, then from each entry's to the next one's

  template <class T>
  void operator()(Group<T> group, char* codes, float* scale) const {
    *scale = group.largest_magnitude();
    const Floats unit(*scale == 0 ? 1.0f : *scale);
    group.store(codes, [&](Floats x) {
      const Floats share = x / unit;
      Floats::Ints code = Floats::Ints{} + steps[0];
      for (int i = 1; i < kEntries; i++) code += (share.raw > middles[i - 1]) & steps[i];
      return to_bytes((Floats::Words)code);
    });
  }
};

template <class T, class S>
void run(const S& scheme, char* codes, typename S::Scale* scales, const T* weight, int64_t rows, int64_t inputs, int64_t stride,
         int64_t group) {
  const int64_t groups = (inputs + group - 1) / group;
  parallel_rows(rows, inputs, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t g = 0, k = 0; g < groups; g++, k += group) {
        const int64_t count = inputs - k < group ? inputs - k : group;
        scheme(Group<T>{weight + r * stride + k, count}, codes + r * inputs + k, scales + r * groups + g);
      }
  });
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(quantize)
(void* codes, void* scales, const void* weight, const void* middles, const void* steps, int64_t rows, int64_t inputs,
 int64_t stride, int64_t group, int64_t kind, int64_t dtype, float levels) {
  using namespace kvrun;
  with_dtype(dtype, [&](auto type) {
    const auto* from = (const typename decltype(type)::type*)weight;
    const auto by = [&](auto scheme) {
      run(scheme, (char*)codes, (typename decltype(scheme)::Scale*)scales, from, rows, inputs, stride, group);
    };
    if (kind == kInt8) return by(ByRow<false>{levels});
    if (kind == kFloat8) return by(ByRow<true>{levels});
    if (kind == kInt4) return by(BySteps{});
    by(ByTable{(const float*)middles, (const int32_t*)steps});
  });
}
