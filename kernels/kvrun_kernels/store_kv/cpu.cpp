// Copies keys, and values where there are any, to their slots; converts where the pool has another dtype.
#include "thread_pool.h"
#include "vec.h"

namespace kvrun {
namespace {

template <class From, class To>
void copy(To* to, const From* from, int64_t count) {
  int64_t i = 0;
  for (; i + Floats::width <= count; i += Floats::width) Floats::load(from + i).store(to + i);
  if (i < count) Floats::load(from + i, count - i).store(to + i, count - i);
}

template <class T>
void copy(T* to, const T* from, int64_t count) {
  memcpy(to, from, count * sizeof(T));
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(store_kv)
(const void* k, const void* v, void* pool, const void* slots, int64_t tokens, int64_t heads, int64_t page_tokens,
 int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, int64_t dim, int64_t v_dim, int64_t pages,
 int64_t from_dtype, int64_t to_dtype) {
  using namespace kvrun;
  const int64_t planes = v ? 2 : 1;
  with_dtype(from_dtype, [&](auto from_type) {
    with_dtype(to_dtype, [&](auto to_type) {
      using From = typename decltype(from_type)::type;
      using To = typename decltype(to_type)::type;
      parallel_rows(tokens, heads * dim * 2, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
          const int64_t slot = ((const int32_t*)slots)[t], page = slot / page_tokens;
          if (slot < 0 || page >= pages) continue;
          for (int64_t h = 0; h < heads; h++) {
            To* key = (To*)pool + ((page * planes * heads + h) * page_tokens + slot % page_tokens) * dim;
            copy(key, (const From*)k + t * k_token + h * k_head, dim);
            if (!v) continue;
            To* value = key + heads * page_tokens * dim;
            copy(value, (const From*)v + t * v_token + h * v_head, v_dim);
            memset((void*)(value + v_dim), 0, (dim - v_dim) * sizeof(To));
          }
        }
      });
    });
  });
}
