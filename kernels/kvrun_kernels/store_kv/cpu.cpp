// Writes keys, and values where there are any, to their slots in the pool's format.
#include "stored_rows.h"
#include "thread_pool.h"

KVRUN_OP(store_kv)
(const void* k, const void* v, void* pool, const void* slots, int64_t tokens, int64_t heads, int64_t page_tokens,
 int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, int64_t dim, int64_t v_dim, int64_t pages,
 int64_t from_dtype, int64_t format) {
  using namespace kvrun;
  const int64_t planes = v ? 2 : 1;
  with_dtype(from_dtype, [&](auto from_type) {
    with_stored_rows(format, [&](auto rows) {
      using From = typename decltype(from_type)::type;
      using Rows = decltype(rows);
      const int64_t row_bytes = Rows::bytes(dim);
      parallel_rows(tokens, heads * dim * 2, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
          const int64_t slot = ((const int32_t*)slots)[t], page = slot / page_tokens;
          if (slot < 0 || page >= pages) continue;
          for (int64_t h = 0; h < heads; h++) {
            char* key = (char*)pool + ((page * planes * heads + h) * page_tokens + slot % page_tokens) * row_bytes;
            Rows::write(key, (const From*)k + t * k_token + h * k_head, dim, dim);
            if (v) Rows::write(key + heads * page_tokens * row_bytes, (const From*)v + t * v_token + h * v_head, v_dim, dim);
          }
        }
      });
    });
  });
}
