// Attention by online softmax over the pages, the same to the bit for every way to cut the work.
//
// Keys are taken in blocks of 64 and blocks in splits of 512, both counted from position 0, never from where a chunk
// begins. Within a split the running maximum, sum and output of a row advance block by block; splits are merged in
// order. A task is a tile of query rows that share a key head, over all splits; or, when tiles are too few for the
// threads, over one split each, whose states are merged afterwards by the same arithmetic.
#include "online_softmax.h"
#include "stored_rows.h"
#include "thread_pool.h"

namespace kvrun {
namespace {

constexpr int64_t kSplit = 512, kTileRows = 64;
// So few rows use a key that widening it for every four of them costs less than keeping it widened.
constexpr int64_t kFewRows = 8;

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
int64_t whole_vectors(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

struct Call {
  void* out;
  const void *q, *pool;
  const int32_t *query_start, *contexts, *page_table, *reach;
  const float *slopes, *sinks, *relative;
  int64_t q_heads, kv_heads, dim, value_dim, planes, sequences, table_stride, page_tokens, pages, q_token, q_head, window;
  int64_t most;  // distance from which the learned bias stays the same
  float scale, softcap;
  int64_t q_dtype, row_bytes;

  int64_t group() const { return q_heads / kv_heads; }
  int64_t padded() const { return whole_vectors(dim); }
  int64_t value_padded() const { return whole_vectors(value_dim); }
  // In a pool of one plane the keys' first numbers are the values.
  int64_t value_stride() const { return planes == 1 ? padded() : value_padded(); }
  // The keys that a row sees end here.
  int64_t end_key(int64_t sequence, int64_t token, int64_t position) const {
    const int64_t end = reach ? at_most(int64_t(reach[token]) + 1, contexts[sequence]) : position + 1;
    return end > 0 ? end : 0;
  }
};

// Query tokens first..last of a sequence under one key head; a row is a token and one of `heads` query heads from
// `first_head`.
struct Tile {
  int64_t sequence, head, first_head, heads, first_token, rows, first_position, begin_key, end_key, first_split, splits;
  size_t state;  // where the states of its splits lie, in floats, when they are computed apart

  int64_t token(int64_t r) const { return first_token + r / heads; }
  int64_t position(int64_t r) const { return first_position + r / heads; }
  int64_t query_head(int64_t r) const { return first_head + r % heads; }
};

// What a task works in: its query rows, one block of keys and values as float32 unless they are read in place, and the
// block's scores.
struct Work {
  float *q, *keys, *values, *scores, *keep, *split, *all;
  char* zeros;  // a stored vector of zeros
  Work(const Call& call, int64_t rows) {
    const int64_t padded = call.padded(), block = kBlock * padded, own = call.planes == 1 ? 0 : kBlock * call.value_padded();
    const int64_t state = State::floats(rows, call.value_padded());
    q = (float*)scratch(kTask, (rows * (padded + kBlock + 1) + block + own + 2 * state) * sizeof(float) + call.row_bytes);
    keys = q + rows * padded;
    scores = keys + block + own;
    values = own ? keys + block : keys;
    keep = scores + rows * kBlock;
    split = keep + rows;
    all = split + state;
    zeros = (char*)(all + state);
    memset(zeros, 0, call.row_bytes);
  }
};

template <class T>
void widen(float* to, const T* from, int64_t dim, int64_t padded) {
  const int64_t whole = dim / lanes * lanes;
  for (int64_t d = 0; d < whole; d += lanes) Floats::load(from + d).store(to + d);
  if (whole < padded) Floats::load(from + whole, dim - whole).store(to + whole);
}

// The tile's key head in the page of a sequence's position, or null where its table names none.
const char* page_of(const Call& call, const Tile& tile, int64_t index) {
  const int64_t page = call.page_table[tile.sequence * call.table_stride + index];
  if (page < 0 || page >= call.pages) return nullptr;
  return (const char*)call.pool + (page * call.planes * call.kv_heads + tile.head) * call.page_tokens * call.row_bytes;
}

// Where the vectors of a block lie in their pages; where no row may see one, `hidden`.
struct Places {
  const char *keys[kBlock], *values[kBlock];
  Places(const Call& call, const Tile& tile, int64_t block, const char* hidden) {
    const int64_t apart = call.planes == 1 ? 0 : call.kv_heads * call.page_tokens * call.row_bytes;
    const int64_t begin = tile.begin_key > block ? tile.begin_key - block : 0, end = at_most(tile.end_key - block, kBlock);
    for (int64_t j = 0; j < kBlock; j++) keys[j] = values[j] = hidden;
    for (int64_t j = begin; j < end;) {
      const int64_t offset = (block + j) % call.page_tokens, last = at_most(j + call.page_tokens - offset, end);
      const char* page = page_of(call, tile, (block + j) / call.page_tokens);
      if (!page) j = last;
      for (const char* at = page + offset * call.row_bytes; j < last; j++, at += call.row_bytes)
        keys[j] = at, values[j] = at + apart;
    }
  }
};

// Vectors of a block, widened as they are read, and those in their places in the next block, which the hardware cannot
// foresee. They go to the second-level cache: two blocks of keys and values do not fit the first.
template <class Rows>
struct InPlace {
  const char* const* rows;
  const char* const* next;
  int64_t dim;
  Floats operator()(int64_t j, int64_t d) const { return Rows::at(rows[j], d, dim); }
  void foresee(int64_t j, int64_t first, int64_t count) const {
    for (int64_t at = Rows::bytes(first); at < Rows::bytes(first + count); at += 64) __builtin_prefetch(next[j] + at, 0, 2);
  }
};

void clear_keys(const Call& call, const Work& work, int64_t first, int64_t last) {
  if (first >= last) return;
  memset(work.keys + first * call.padded(), 0, (last - first) * call.padded() * sizeof(float));
  if (call.planes == 1) return;
  memset(work.values + first * call.value_padded(), 0, (last - first) * call.value_padded() * sizeof(float));
}

// The tile's part of a block of keys and values. What no row may see is zeroed and never read: it may be no number.
template <class Rows>
void gather(const Call& call, const Tile& tile, int64_t block, const Work& work) {
  const int64_t padded = call.padded(), value_padded = call.value_padded(), row_bytes = Rows::bytes(call.dim);
  const int64_t values = call.planes == 1 ? 0 : call.kv_heads * call.page_tokens * row_bytes;
  const int64_t begin = tile.begin_key > block ? tile.begin_key - block : 0, end = at_most(tile.end_key - block, kBlock);
  clear_keys(call, work, 0, begin);
  clear_keys(call, work, end, kBlock);
  for (int64_t j = begin; j < end;) {
    const int64_t index = (block + j) / call.page_tokens, offset = (block + j) % call.page_tokens;
    const int64_t last = at_most(j + call.page_tokens - offset, end);
    const char* page = page_of(call, tile, index);
    // The hardware cannot foresee where the next page lies.
    const char* next = block + last < tile.end_key ? page_of(call, tile, (block + last) / call.page_tokens) : page;
    if (!page) clear_keys(call, work, j, last), j = last;
    for (int64_t at = offset * row_bytes; j < last; j++, at += row_bytes) {
      for (int64_t d = 0; next && d < row_bytes; d += 64) {
        __builtin_prefetch(next + at + d);
        __builtin_prefetch(next + at + d + values);
      }
      Rows::read(work.keys + j * padded, page + at, call.dim, call.dim);
      if (values) Rows::read(work.values + j * value_padded, page + at + values, call.value_dim, call.dim);
    }
  }
}

// The learned bias of as many keys as there are lanes, the first of them `away` keys past the query.
Floats bias_of(const float* relative, int64_t away, int64_t most) {
  const int64_t first = away + most, last = first + lanes - 1;
  if (first >= 0 && last <= 2 * most) return Floats::load(relative + first);
  float all[lanes];
  for (int64_t i = 0; i < lanes; i++) all[i] = relative[first + i < 0 ? 0 : at_most(first + i, 2 * most)];
  return Floats::load(all);
}

// Turns a row's raw scores into shares of the block, and moves its maximum and sum on; says how much of the earlier
// output remains. `begin` and `end` bound the keys of the block that the row sees.
float weigh(const Call& call, float* scores, int64_t begin, int64_t end, float slope, const float* relative,
            int64_t distance, float& top, float& total) {
  for (int64_t j = 0; j < begin; j++) scores[j] = kMinusInfinity;
  for (int64_t j = end; j < kBlock; j++) scores[j] = kMinusInfinity;
  if (begin >= end) {
    memset(scores, 0, kBlock * sizeof(float));
    return 1.0f;
  }
  Floats best(kMinusInfinity);
  for (int64_t j = 0; j < kBlock; j += lanes) {
    Floats s = Floats::load(scores + j) * Floats(call.scale);
    if (call.softcap != 0) {
      const Floats capped = tanh(s / Floats(call.softcap)) * Floats(call.softcap);
      s = s.raw == kMinusInfinity ? s.raw : capped.raw;
    }
    if (slope != 0) {
      float away[lanes];
      for (int i = 0; i < lanes; i++) away[i] = float(j + i - distance);
      s = fma(Floats(slope), Floats::load(away), s);
    }
    if (relative) s = s + bias_of(relative, j - distance, call.most);
    s.store(scores + j);
    best = max(s, best);
  }
  const float block_top = largest(best), next = block_top > top ? block_top : top, keep = exp1(top - next);
  Floats sums = Floats::zero();
  for (int64_t j = 0; j < kBlock; j += lanes) {
    const Floats share = exp(Floats::load(scores + j) - Floats(next));
    share.store(scores + j);
    sums = sums + share;
  }
  total = total * keep + sum(sums);
  top = next;
  return keep;
}

// Advances the rows' states by a block of keys and values.
template <class Vectors>
void attend_vectors(const Call& call, const Tile& tile, int64_t block, const Work& work, State state, Vectors keys,
                    Vectors values) {
  const int64_t padded = call.padded(), value_padded = call.value_padded(), count = at_most(tile.end_key - block, kBlock);
  in_fours(tile.rows, [&](int64_t r, int height) {
    constexpr void (*by_height[])(const float*, const Vectors&, float*, int64_t, int64_t) = {
        score<1, Vectors>, score<2, Vectors>, score<3, Vectors>, score<4, Vectors>};
    by_height[height - 1](work.q + r * padded, keys, work.scores + r * kBlock, count, padded);
  });
  for (int64_t r = 0; r < tile.rows; r++) {
    const int64_t position = tile.position(r), head = tile.query_head(r);
    int64_t begin = call.window ? position - call.window + 1 - block : 0;
    int64_t end = call.end_key(tile.sequence, tile.token(r), position) - block;
    begin = begin < 0 ? 0 : at_most(begin, kBlock);
    end = end < 0 ? 0 : at_most(end, kBlock);
    const float slope = call.slopes ? call.slopes[head] : 0;
    const float* relative = call.relative ? call.relative + head * (2 * call.most + 1) : nullptr;
    work.keep[r] = weigh(call, work.scores + r * kBlock, begin, end, slope, relative, position - block, state.top[r],
                         state.total[r]);
  }
  in_fours(tile.rows, [&](int64_t r, int height) {
    constexpr void (*by_height[])(float*, const float*, const float*, const Vectors&, int64_t, int64_t) = {
        add_values<1, Vectors>, add_values<2, Vectors>, add_values<3, Vectors>, add_values<4, Vectors>};
    by_height[height - 1](state.out + r * value_padded, work.keep + r, work.scores + r * kBlock, values, count, value_padded);
  });
}

template <class Rows>
void attend_block(const Call& call, const Tile& tile, int64_t block, const Work& work, State state) {
  if (tile.rows > kFewRows || call.dim % lanes || call.value_dim % lanes) {
    gather<Rows>(call, tile, block, work);
    attend_vectors(call, tile, block, work, state, Widened{work.keys, call.padded()}, Widened{work.values, call.value_stride()});
    return;
  }
  const Places here(call, tile, block, work.zeros), next(call, tile, block + kBlock, work.zeros);
  attend_vectors(call, tile, block, work, state, InPlace<Rows>{here.keys, next.keys, call.dim},
                 InPlace<Rows>{here.values, next.values, call.dim});
}

template <class Rows>
void attend_split(const Call& call, const Tile& tile, int64_t split, const Work& work, State state) {
  state.clear(tile.rows, call.value_padded());
  int64_t block = split * kSplit;
  if (block < tile.begin_key) block = tile.begin_key / kBlock * kBlock;
  for (; block < tile.end_key && block < (split + 1) * kSplit; block += kBlock)
    attend_block<Rows>(call, tile, block, work, state);
}

void load_queries(const Call& call, const Tile& tile, float* to) {
  with_dtype(call.q_dtype, [&](auto type) {
    using Q = typename decltype(type)::type;
    for (int64_t r = 0; r < tile.rows; r++) {
      const Q* from = (const Q*)call.q + tile.token(r) * call.q_token + tile.query_head(r) * call.q_head;
      widen(to + r * call.padded(), from, call.dim, call.padded());
    }
  });
}

void store_out(const Call& call, const Tile& tile, State state) {
  with_dtype(call.q_dtype, [&](auto type) {
    using Q = typename decltype(type)::type;
    for (int64_t r = 0; r < tile.rows; r++) {
      const int64_t head = tile.query_head(r);
      Q* to = (Q*)call.out + (tile.token(r) * call.q_heads + head) * call.value_dim;
      const float* from = state.out + r * call.value_padded();
      const Floats scale(state.scale(r, call.sinks ? call.sinks + head : nullptr));
      for (int64_t d = 0; d < call.value_dim; d += lanes) {
        const Floats y = Floats::load(from + d) * scale;
        call.value_dim - d >= lanes ? y.store(to + d) : y.store(to + d, call.value_dim - d);
      }
    }
  });
}

// The keys that some row of a tile sees, and the splits that they lie in.
void find_keys(const Call& call, Tile& tile) {
  const int64_t tokens = tile.rows / tile.heads;
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t end = call.end_key(tile.sequence, tile.first_token + t, tile.first_position + t);
    if (end > tile.end_key) tile.end_key = end;
  }
  if (call.window && tile.first_position - call.window + 1 > 0)
    tile.begin_key = at_most(tile.first_position - call.window + 1, tile.end_key);
  tile.first_split = tile.begin_key / kSplit;
  tile.splits = (tile.end_key + kSplit - 1) / kSplit - tile.first_split;
}

// Lists the tiles; says how many there are. With no list it only counts.
int64_t list_tiles(const Call& call, Tile* tiles) {
  int64_t count = 0;
  // Many query heads over one key head share out among tiles of one token each.
  const int64_t group = call.group(), parts = (group + kTileRows - 1) / kTileRows, most = parts > 1 ? 1 : kTileRows / group;
  for (int64_t n = 0; n < call.sequences; n++) {
    const int64_t start = call.query_start[n], tokens = call.query_start[n + 1] - start;
    for (int64_t head = 0; head < call.kv_heads; head++)
      for (int64_t t = 0; t < tokens; t += most)
        for (int64_t part = 0; part < parts; part++, count++) {
          if (!tiles) continue;
          const int64_t first_head = group * part / parts, heads = group * (part + 1) / parts - first_head;
          Tile& tile = tiles[count];
          tile = {n, head, head * group + first_head, heads, start + t, at_most(tokens - t, most) * heads,
                  call.contexts[n] - tokens + t, 0, 0, 0, 0, 0};
          find_keys(call, tile);
        }
  }
  return count;
}

template <class Rows>
void attend_whole(const Call& call, const Tile& tile) {
  const int64_t padded = call.value_padded();
  const Work work(call, tile.rows);
  load_queries(call, tile, work.q);
  State all(work.all, tile.rows), split(work.split, tile.rows);
  all.clear(tile.rows, padded);
  for (int64_t s = 0; s < tile.splits; s++) {
    attend_split<Rows>(call, tile, tile.first_split + s, work, split);
    merge(all, split, tile.rows, padded);
  }
  store_out(call, tile, all);
}

// One task per tile and split, then one per tile to merge.
template <class Rows>
void attend_apart(const Call& call, Tile* tiles, int64_t count) {
  const int64_t padded = call.value_padded();
  size_t floats = 0;
  int64_t tasks = 0;
  for (int64_t i = 0; i < count; i++) {
    tiles[i].state = floats;
    floats += tiles[i].splits * State::floats(tiles[i].rows, padded);
    tasks += tiles[i].splits;
  }
  float* states = (float*)scratch(kCall, floats * sizeof(float));
  parallel_for(tasks, [&](int64_t task) {
    int64_t i = 0;
    while (task >= tiles[i].splits) task -= tiles[i++].splits;
    const Tile& tile = tiles[i];
    const Work work(call, tile.rows);
    load_queries(call, tile, work.q);
    float* state = states + tile.state + task * State::floats(tile.rows, padded);
    attend_split<Rows>(call, tile, tile.first_split + task, work, State(state, tile.rows));
  });
  parallel_for(count, [&](int64_t i) {
    const Tile& tile = tiles[i];
    State all(Work(call, tile.rows).all, tile.rows);
    all.clear(tile.rows, padded);
    for (int64_t s = 0; s < tile.splits; s++)
      merge(all, State(states + tile.state + s * State::floats(tile.rows, padded), tile.rows), tile.rows, padded);
    store_out(call, tile, all);
  });
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(paged_attention)
(void* out, const void* q, const void* pool, const int32_t* query_start, const int32_t* contexts,
 const int32_t* page_table, const int32_t* reach, const float* slopes, const float* sinks, const float* relative,
 int64_t q_heads, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t planes, int64_t sequences,
 int64_t table_stride, int64_t page_tokens, int64_t pages, int64_t q_token, int64_t q_head, int64_t window, int64_t most,
 float scale, float softcap, int64_t q_dtype, int64_t pool_dtype) {
  using namespace kvrun;
  int64_t row_bytes = 0;
  with_stored_rows(pool_dtype, [&](auto rows) { row_bytes = decltype(rows)::bytes(dim); });
  const Call call{out,       q,         pool,         query_start, contexts,    page_table, reach,   slopes, sinks,
                  relative,  q_heads,   kv_heads,     dim,         value_dim,   planes,     sequences, table_stride,
                  page_tokens, pages,   q_token,      q_head,      window,      most,       scale,   softcap,
                  q_dtype,   row_bytes};
  const int64_t count = list_tiles(call, nullptr);
  Tile* tiles = (Tile*)scratch(kCallTable, count * sizeof(Tile));
  list_tiles(call, tiles);
  int64_t splits = 0;
  for (int64_t i = 0; i < count; i++) splits += tiles[i].splits;
  const bool apart = count < 4 * thread_count() && splits > count;
  with_stored_rows(pool_dtype, [&](auto rows) {
    using Rows = decltype(rows);
    if (apart)
      attend_apart<Rows>(call, tiles, count);
    else
      parallel_for(count, [&](int64_t i) { attend_whole<Rows>(call, tiles[i]); });
  });
}
