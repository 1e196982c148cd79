// What the ops that carry a state from step to step share: whose rows, which slot, and the functions around the state.
#pragma once

#include "thread_pool.h"
#include "vec.h"

namespace kvrun {
namespace {

constexpr int lanes = Floats::width;

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
inline int64_t whole_vectors(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

// Sequence n owns rows query_start[n] to query_start[n + 1], and a slot.
struct Sequences {
  int64_t count, slot_count;
  const int32_t *query_start, *slots;
  const uint8_t* fresh;

  int64_t start(int64_t n) const { return query_start[n]; }
  int64_t stop(int64_t n) const { return query_start[n + 1]; }
  // The state of one slot of so many elements; null where the table names none.
  template <class T>
  T* state(T* states, int64_t elements, int64_t n) const {
    return slots[n] < 0 || slots[n] >= slot_count ? nullptr : states + slots[n] * elements;
  }
};

inline float as_float(float value) { return value; }
inline float as_float(Bfloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
inline float as_float(Float16 value) { return half_to_float(value.bits); }

// Loads or stores up to a vector.
template <class T>
Floats load_some(const T* from, int64_t n) {
  return n >= lanes ? Floats::load(from) : Floats::load(from, n > 0 ? n : 0);
}
template <class T>
void store_some(Floats v, T* to, int64_t n) {
  n >= lanes ? v.store(to) : v.store(to, n);
}

// ln(1 + e^x). With u = e^-|x| and s = u / (2 + u), ln(1 + u) is 2 atanh(s), and s is at most 1/3.
inline Floats softplus(Floats x) {
  const Floats u = exp(Floats::zero() - abs(x)), s = u / (Floats(2.0f) + u), square = s * s;
  Floats p(1.0f / 13);
  constexpr float terms[] = {1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f};
  for (float term : terms) p = fma(p, square, Floats(term));
  // Comparing this way round lets a NaN through.
  const Floats above = x.raw < 0.0f ? Floats::Raw{} : x.raw;
  return fma(Floats(2.0f) * s, p, above);
}

inline Floats silu(Floats x) { return x * sigmoid(x); }

// A column of a matrix of `stride` columns: one element each of up to as many rows as there are lanes.
template <class T>
Floats load_column(const T* from, int64_t stride, int64_t rows) {
  float all[lanes] = {};
  for (int64_t i = 0; i < rows; i++) all[i] = as_float(from[i * stride]);
  return Floats::load(all);
}
template <class T>
void store_column(Floats v, T* to, int64_t stride, int64_t rows) {
  T all[lanes];
  v.store(all);
  for (int64_t i = 0; i < rows; i++) to[i * stride] = all[i];
}

// Rows of `width` elements as float32, each `padded` apart and zero at its end.
template <class T>
void widen_rows(float* to, const T* from, int64_t rows, int64_t stride, int64_t width, int64_t padded) {
  for (int64_t r = 0; r < rows; r++, to += padded, from += stride)
    for (int64_t i = 0; i < padded; i += lanes) load_some(from + i, width - i).store(to + i);
}

// The states of as many channels as there are lanes, [lanes][padded]: those of the slot itself where they fill whole
// vectors, else a copy.
struct States {
  float *at, *kept;
  int64_t rows, size, padded;

  States(float* copy, float* kept, bool fresh, int64_t rows, int64_t size, int64_t padded)
      : at(copy), kept(kept), rows(rows), size(size), padded(padded) {
    if (kept && rows == lanes && size == padded) at = kept;
    if (fresh || !kept)
      memset(at, 0, lanes * padded * sizeof(float));
    else if (at != kept) {
      widen_rows(at, kept, rows, size, size, padded);
      memset(at + rows * padded, 0, (lanes - rows) * padded * sizeof(float));
    }
  }
  void keep() const {
    for (int64_t r = 0; kept && at != kept && r < rows; r++) memcpy(kept + r * size, at + r * padded, size * sizeof(float));
  }
  // h = h * decay(channel, place) + gain b, y = h . c, for every channel.
  template <class F>
  void advance(const float* gain, const float* b, const float* c, float* y, const F& decay) const {
    for (int64_t r = 0; r < lanes; r += 4) {
      Floats sums[4] = {Floats::zero(), Floats::zero(), Floats::zero(), Floats::zero()};
      for (int64_t v = 0; v < padded; v += lanes) {
        const Floats into = Floats::load(b + v), out_of = Floats::load(c + v);
        for (int64_t i = 0; i < 4; i++) {
          float* place = at + (r + i) * padded + v;
          const Floats h = fma(Floats::load(place), decay(r + i, v), Floats(gain[r + i]) * into);
          h.store(place);
          sums[i] = fma(h, out_of, sums[i]);
        }
      }
      sum4(sums[0], sums[1], sums[2], sums[3], y + r);
    }
  }
};

}  // namespace
}  // namespace kvrun
