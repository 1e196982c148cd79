// Rows of a weight into the panels that products stream.
#include "codes.h"
#include "thread_pool.h"

namespace kvrun {
namespace {

// Elements of a row that are moved at a time, for all rows of a panel: what they fill of it stays in the first level of cache,
// which reading a whole row before the next would not.
constexpr int64_t kAtOnce = 32;

// Eight codes of 4 bits, a byte each, as the word that Nibbles reads (codes.h).
inline uint32_t word_of(uint64_t codes) {
  const uint64_t pairs = codes | codes >> 12;  // bytes 0, 1, 4 and 5 now hold codes (0 2), (1 3), (4 6) and (5 7)
  const uint32_t low = uint32_t(pairs), high = uint32_t(pairs >> 32);
  return (low & 0xff) | (high & 0xff) << 8 | (low & 0xff00) << 8 | (high & 0xff00) << 16;
}

// Elements of `bytes` bytes; of codes that take a byte each, eight make one.
template <int bytes, bool nibbles>
void pack(uint8_t* panels, const uint8_t* from, int64_t first, int64_t rows, int64_t elements, int64_t width, int64_t stride) {
  constexpr int64_t taken = nibbles ? 8 : bytes;  // bytes of a row for an element
  const int64_t begin = first / kPanel, end = (first + rows + kPanel - 1) / kPanel;
  parallel_for(end - begin, [&](int64_t p) {
    const int64_t top = (begin + p) * kPanel;
    const int64_t low = first > top ? first - top : 0, high = first + rows - top < kPanel ? first + rows - top : kPanel;
    for (int64_t e = 0; e < elements; e += kAtOnce) {
      const int64_t count = elements - e < kAtOnce ? elements - e : kAtOnce;
      for (int64_t n = low; n < high; n++) {
        const uint8_t* row = from + (top + n - first) * stride + e * taken;
        uint8_t* to = panels + ((top * elements) + e * kPanel + n) * bytes;
        uint8_t ended[kAtOnce * taken];
        if (const int64_t left = width - e * taken; left < count * taken) {
          memset(ended, 0, sizeof ended);
          if (left > 0) memcpy(ended, row, left);
          row = ended;
        }
        for (int64_t i = 0; i < count; i++, row += taken, to += kPanel * bytes) {
          if constexpr (nibbles) {
            uint64_t codes;
            memcpy(&codes, row, 8);
            const uint32_t word = word_of(codes);
            memcpy(to, &word, 4);
          } else {
            memcpy(to, row, bytes);
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(pack_panels)
(void* panels, const void* from, int64_t first, int64_t rows, int64_t elements, int64_t bytes, int64_t width, int64_t stride,
 int64_t nibbles) {
  using namespace kvrun;
  const auto run = nibbles ? pack<4, true> : bytes == 1 ? pack<1, false> : bytes == 2 ? pack<2, false> : pack<4, false>;
  run((uint8_t*)panels, (const uint8_t*)from, first, rows, elements, width, stride);
}
