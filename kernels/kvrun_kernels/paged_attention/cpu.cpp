// Attention by online softmax over the pages, the same to the bit for every way to cut the work.
//
// Keys are taken in blocks of 64 and blocks in splits of 512, both counted from position 0, never from where a chunk
// begins. Within a split the running maximum, sum and output of a row advance block by block; splits are merged in
// order. A task is a tile of query rows that share a key head, over all splits; or, when tiles are too few for the
// threads, over one split each, whose states are merged afterwards by the same arithmetic.
#include "thread_pool.h"
#include "vec.h"

namespace kvrun {
namespace {

constexpr int64_t kBlock = 64, kSplit = 512, kTileRows = 64;
constexpr int lanes = Floats::width;
constexpr float kMinusInfinity = -__builtin_inff();

struct Call {
  void* out;
  const void *q, *pool;
  const int32_t *query_start, *contexts, *page_table;
  const float* slopes;
  int64_t q_heads, kv_heads, dim, sequences, table_stride, page_tokens, pages, q_token, q_head, window;
  float scale, softcap;
  int64_t q_dtype, pool_dtype;

  int64_t group() const { return q_heads / kv_heads; }
  int64_t padded() const { return (dim + lanes - 1) / lanes * lanes; }
};

// Query tokens first..last of a sequence under one key head; a row is a token and one of the head's query heads.
struct Tile {
  int64_t sequence, head, first_token, rows, first_position, begin_key, end_key, first_split, splits;
  size_t state;  // where the states of its splits lie, in floats, when they are computed apart
};

// Running maximum, sum and output of each row; lies in memory as [rows] [rows] [rows][padded].
struct State {
  float *top, *total, *out;
  State(float* memory, int64_t rows) : top(memory), total(memory + rows), out(memory + 2 * rows) {}
  static int64_t floats(int64_t rows, int64_t padded) { return rows * (padded + 2); }
  void clear(int64_t rows, int64_t padded) {
    for (int64_t r = 0; r < rows; r++) top[r] = kMinusInfinity;
    memset(total, 0, rows * sizeof(float));
    memset(out, 0, rows * padded * sizeof(float));
  }
};

void merge(State into, State next, int64_t rows, int64_t padded) {
  for (int64_t r = 0; r < rows; r++) {
    if (next.top[r] == kMinusInfinity) continue;
    const float top = into.top[r] > next.top[r] ? into.top[r] : next.top[r];
    const float keep = exp1(into.top[r] - top), add = exp1(next.top[r] - top);
    into.top[r] = top;
    into.total[r] = into.total[r] * keep + next.total[r] * add;
    for (int64_t d = 0; d < padded; d += lanes) {
      float* to = into.out + r * padded + d;
      fma(Floats::load(next.out + r * padded + d), Floats(add), Floats::load(to) * Floats(keep)).store(to);
    }
  }
}

// What a task works in: its query rows, one block of keys and values as float32, and the block's scores.
struct Work {
  float *q, *keys, *values, *scores, *keep, *split, *all;
  Work(int64_t rows, int64_t padded) {
    const int64_t block = kBlock * padded, state = State::floats(rows, padded);
    q = (float*)scratch(kTask, (rows * (padded + kBlock + 1) + 2 * block + 2 * state) * sizeof(float));
    keys = q + rows * padded;
    values = keys + block;
    scores = values + block;
    keep = scores + rows * kBlock;
    split = keep + rows;
    all = split + state;
  }
};

template <class T>
void widen(float* to, const T* from, int64_t dim, int64_t padded) {
  const int64_t whole = dim / lanes * lanes;
  for (int64_t d = 0; d < whole; d += lanes) Floats::load(from + d).store(to + d);
  if (whole < padded) Floats::load(from + whole, dim - whole).store(to + whole);
}

// The tile's key head in the page of a sequence's position, or null where its table names none.
template <class T>
const T* page_of(const Call& call, const Tile& tile, int64_t index) {
  const int64_t page = call.page_table[tile.sequence * call.table_stride + index];
  if (page < 0 || page >= call.pages) return nullptr;
  return (const T*)call.pool + (page * 2 * call.kv_heads + tile.head) * call.page_tokens * call.dim;
}

void clear_keys(const Work& work, int64_t first, int64_t last, int64_t padded) {
  if (first >= last) return;
  memset(work.keys + first * padded, 0, (last - first) * padded * sizeof(float));
  memset(work.values + first * padded, 0, (last - first) * padded * sizeof(float));
}

// The tile's part of a block of keys and values. What no row may see is zeroed and never read: it may be no number.
template <class T>
void gather(const Call& call, const Tile& tile, int64_t block, const Work& work) {
  const int64_t padded = call.padded(), values = call.kv_heads * call.page_tokens * call.dim;
  const int64_t begin = tile.begin_key > block ? tile.begin_key - block : 0;
  const int64_t end = tile.end_key - block < kBlock ? tile.end_key - block : kBlock;
  clear_keys(work, 0, begin, padded);
  clear_keys(work, end, kBlock, padded);
  for (int64_t j = begin; j < end;) {
    const int64_t index = (block + j) / call.page_tokens, offset = (block + j) % call.page_tokens;
    const int64_t left = call.page_tokens - offset, last = j + left < end ? j + left : end;
    const T* page = page_of<T>(call, tile, index);
    // The hardware cannot foresee where the next page lies.
    const T* next = block + last < tile.end_key ? page_of<T>(call, tile, (block + last) / call.page_tokens) : page;
    if (!page) clear_keys(work, j, last, padded), j = last;
    for (int64_t at = offset * call.dim; j < last; j++, at += call.dim) {
      for (int64_t d = 0; next && d < call.dim; d += 64 / int64_t(sizeof(T))) {
        __builtin_prefetch(next + at + d);
        __builtin_prefetch(next + at + d + values);
      }
      widen(work.keys + j * padded, page + at, call.dim, padded);
      widen(work.values + j * padded, page + at + values, call.dim, padded);
    }
  }
}

// Scores of R rows against four keys at a time: each a sum over lanes, folded the same way every time.
template <int R>
void score(const float* q, const float* keys, float* scores, int64_t count, int64_t padded) {
  for (int64_t j = 0; j < count; j += 4) {
    Floats sums[R][4];
    for (int r = 0; r < R; r++)
      for (int k = 0; k < 4; k++) sums[r][k] = Floats::zero();
    for (int64_t d = 0; d < padded; d += lanes) {
      Floats key[4];
      for (int k = 0; k < 4; k++) key[k] = Floats::load(keys + (j + k) * padded + d);
      for (int r = 0; r < R; r++) {
        const Floats query = Floats::load(q + r * padded + d);
        for (int k = 0; k < 4; k++) sums[r][k] = fma(query, key[k], sums[r][k]);
      }
    }
    for (int r = 0; r < R; r++) sum4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], scores + r * kBlock + j);
  }
}

// out = out * keep + shares x values, for R rows and V vectors of the head.
template <int R, int V>
void add_values(float* out, const float* keep, const float* shares, const float* values, int64_t count, int64_t padded) {
  Floats sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = Floats::load(out + r * padded + v * lanes) * Floats(keep[r]);
  for (int64_t j = 0; j < count; j++) {
    Floats value[V];
    for (int v = 0; v < V; v++) value[v] = Floats::load(values + j * padded + v * lanes);
    for (int r = 0; r < R; r++) {
      const Floats share(shares[r * kBlock + j]);
      for (int v = 0; v < V; v++) sums[r][v] = fma(share, value[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v].store(out + r * padded + v * lanes);
}

template <int R>
void add_values(float* out, const float* keep, const float* shares, const float* values, int64_t count, int64_t padded) {
  // One row alone needs more sums at once to hide their latency.
  constexpr int V = R == 1 ? 8 : 4;
  int64_t d = 0;
  for (; d + V * lanes <= padded; d += V * lanes) add_values<R, V>(out + d, keep, shares, values + d, count, padded);
  for (; d < padded; d += lanes) add_values<R, 1>(out + d, keep, shares, values + d, count, padded);
}

// Turns a row's raw scores into shares of the block, and moves its maximum and sum on; says how much of the earlier
// output remains. `begin` and `end` bound the keys of the block that the row sees.
float weigh(const Call& call, float* scores, int64_t begin, int64_t end, float slope, int64_t distance, float& top,
            float& total) {
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

template <class F>
void in_fours(int64_t rows, const F& f) {
  for (int64_t r = 0; r < rows; r += 4) f(r, rows - r < 4 ? int(rows - r) : 4);
}

template <class T>
void attend_block(const Call& call, const Tile& tile, int64_t block, const Work& work, State state) {
  const int64_t padded = call.padded(), group = call.group();
  const int64_t count = tile.end_key - block < kBlock ? tile.end_key - block : kBlock;
  gather<T>(call, tile, block, work);
  in_fours(tile.rows, [&](int64_t r, int height) {
    constexpr void (*by_height[])(const float*, const float*, float*, int64_t, int64_t) = {score<1>, score<2>, score<3>,
                                                                                          score<4>};
    by_height[height - 1](work.q + r * padded, work.keys, work.scores + r * kBlock, count, padded);
  });
  for (int64_t r = 0; r < tile.rows; r++) {
    const int64_t position = tile.first_position + r / group;
    int64_t begin = call.window ? position - call.window + 1 - block : 0, end = position + 1 - block;
    begin = begin < 0 ? 0 : begin > kBlock ? kBlock : begin;
    end = end < 0 ? 0 : end > kBlock ? kBlock : end;
    const float slope = call.slopes ? call.slopes[tile.head * group + r % group] : 0;
    work.keep[r] = weigh(call, work.scores + r * kBlock, begin, end, slope, position - block, state.top[r], state.total[r]);
  }
  in_fours(tile.rows, [&](int64_t r, int height) {
    constexpr void (*by_height[])(float*, const float*, const float*, const float*, int64_t, int64_t) = {
        add_values<1>, add_values<2>, add_values<3>, add_values<4>};
    by_height[height - 1](state.out + r * padded, work.keep + r, work.scores + r * kBlock, work.values, count, padded);
  });
}

template <class T>
void attend_split(const Call& call, const Tile& tile, int64_t split, const Work& work, State state) {
  state.clear(tile.rows, call.padded());
  int64_t block = split * kSplit;
  if (block < tile.begin_key) block = tile.begin_key / kBlock * kBlock;
  for (; block < tile.end_key && block < (split + 1) * kSplit; block += kBlock)
    attend_block<T>(call, tile, block, work, state);
}

void load_queries(const Call& call, const Tile& tile, float* to) {
  const int64_t group = call.group();
  with_dtype(call.q_dtype, [&](auto type) {
    using Q = typename decltype(type)::type;
    for (int64_t r = 0; r < tile.rows; r++) {
      const int64_t token = tile.first_token + r / group, head = tile.head * group + r % group;
      const Q* from = (const Q*)call.q + token * call.q_token + head * call.q_head;
      widen(to + r * call.padded(), from, call.dim, call.padded());
    }
  });
}

void store_out(const Call& call, const Tile& tile, State state) {
  const int64_t group = call.group();
  with_dtype(call.q_dtype, [&](auto type) {
    using Q = typename decltype(type)::type;
    for (int64_t r = 0; r < tile.rows; r++) {
      const int64_t token = tile.first_token + r / group, head = tile.head * group + r % group;
      Q* to = (Q*)call.out + (token * call.q_heads + head) * call.dim;
      const float* from = state.out + r * call.padded();
      const Floats scale(state.total[r] > 0 ? 1.0f / state.total[r] : 0.0f);
      for (int64_t d = 0; d < call.dim; d += lanes) {
        const Floats y = Floats::load(from + d) * scale;
        call.dim - d >= lanes ? y.store(to + d) : y.store(to + d, call.dim - d);
      }
    }
  });
}

// Lists the tiles; says how many there are. With no list it only counts.
int64_t list_tiles(const Call& call, Tile* tiles) {
  int64_t count = 0;
  const int64_t most = call.group() < kTileRows ? kTileRows / call.group() : 1;
  for (int64_t n = 0; n < call.sequences; n++) {
    const int64_t start = call.query_start[n], tokens = call.query_start[n + 1] - start;
    for (int64_t head = 0; head < call.kv_heads; head++)
      for (int64_t t = 0; t < tokens; t += most, count++) {
        if (!tiles) continue;
        const int64_t height = tokens - t < most ? tokens - t : most, first = call.contexts[n] - tokens + t;
        Tile& tile = tiles[count];
        tile = {n, head, start + t, height * call.group(), first, 0, first + height, 0, 0, 0};
        if (call.window && first - call.window + 1 > 0) tile.begin_key = first - call.window + 1;
        tile.first_split = tile.begin_key / kSplit;
        tile.splits = (tile.end_key + kSplit - 1) / kSplit - tile.first_split;
      }
  }
  return count;
}

template <class T>
void attend_whole(const Call& call, const Tile& tile) {
  const int64_t padded = call.padded();
  const Work work(tile.rows, padded);
  load_queries(call, tile, work.q);
  State all(work.all, tile.rows), split(work.split, tile.rows);
  all.clear(tile.rows, padded);
  for (int64_t s = 0; s < tile.splits; s++) {
    attend_split<T>(call, tile, tile.first_split + s, work, split);
    merge(all, split, tile.rows, padded);
  }
  store_out(call, tile, all);
}

// One task per tile and split, then one per tile to merge.
template <class T>
void attend_apart(const Call& call, Tile* tiles, int64_t count) {
  const int64_t padded = call.padded();
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
    const Work work(tile.rows, padded);
    load_queries(call, tile, work.q);
    float* state = states + tile.state + task * State::floats(tile.rows, padded);
    attend_split<T>(call, tile, tile.first_split + task, work, State(state, tile.rows));
  });
  parallel_for(count, [&](int64_t i) {
    const Tile& tile = tiles[i];
    State all(Work(tile.rows, padded).all, tile.rows);
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
 const int32_t* page_table, const float* slopes, int64_t q_heads, int64_t kv_heads, int64_t dim, int64_t sequences,
 int64_t table_stride, int64_t page_tokens, int64_t pages, int64_t q_token, int64_t q_head, float scale, int64_t window,
 float softcap, int64_t q_dtype, int64_t pool_dtype) {
  using namespace kvrun;
  const Call call{out,       q,        pool,         query_start, contexts, page_table, slopes, q_heads, kv_heads, dim,
                  sequences, table_stride, page_tokens, pages,    q_token,  q_head,     window, scale,   softcap,
                  q_dtype,   pool_dtype};
  const int64_t count = list_tiles(call, nullptr);
  Tile* tiles = (Tile*)scratch(kCallTable, count * sizeof(Tile));
  list_tiles(call, tiles);
  int64_t splits = 0;
  for (int64_t i = 0; i < count; i++) splits += tiles[i].splits;
  const bool apart = count < 4 * thread_count() && splits > count;
  with_dtype(pool_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (apart)
      attend_apart<T>(call, tiles, count);
    else
      parallel_for(count, [&](int64_t i) { attend_whole<T>(call, tiles[i]); });
  });
}
