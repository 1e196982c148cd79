// Attention by online softmax over the pages, the same to the bit for every way to cut the work.
//
// Keys are taken in blocks of 64 and blocks in splits of 512, both counted from position 0, never from where a chunk
// begins. Within a split the running maximum, sum and output of a row advance block by block; splits are merged in
// order. A task is a tile of query rows that share a key head, over all splits; or, when tiles are too few for the
// threads, over one split each, whose states are merged afterwards by the same arithmetic.
#include "key_block.h"
#include "thread_pool.h"

namespace kvrun {
namespace {

constexpr int64_t kSplit = 512, kTileRows = 96;

int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

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
  int64_t value_panels() const { return (value_dim + kPanel - 1) / kPanel; }
  // The keys that a row sees end here.
  int64_t end_key(int64_t sequence, int64_t token, int64_t position) const {
    const int64_t end = reach ? at_most(int64_t(reach[token]) + 1, contexts[sequence]) : position + 1;
    return end > 0 ? end : 0;
  }
};

// Query tokens first..last of a sequence under one key head; a row is a token and one of `heads` query heads from
// `first_head`.
struct Queries {
  int64_t sequence, head, first_head, heads, first_token, rows, first_position, begin_key, end_key, first_split, splits;
  size_t state;  // where the states of its splits lie, in floats, when they are computed apart

  int64_t token(int64_t r) const { return first_token + r / heads; }
  int64_t position(int64_t r) const { return first_position + r / heads; }
  int64_t query_head(int64_t r) const { return first_head + r % heads; }
};

// What a task works in. S is how a step of the products multiplies.
template <class S>
struct Work {
  using W = typename S::Weight;
  using X = typename S::X;
  using Row = Shares<X>;
  int64_t rows, steps;        // of a score
  X *q, *shares;              // [run of up to kRows rows] [step] [row], and [row] [Row::kRow]
  W* panels;                  // as Packer makes them, of keys, then of values
  float *scales, *scores, *tops, *keep;  // of keys, then of values; [panel] [row] [kPanel]; [row]
  char* zeros;                // a stored vector of zeros
  float *split, *all;         // states
  Work(const Call& call, int64_t r) : rows(r), steps(steps_of<S>(call.dim)) {
    const int64_t padded = rounded_up(call.dim, 64), whole = rounded_up(rows, lanes);
    const int64_t state = State::floats(rows, call.value_panels());
    char* memory = (char*)scratch(kTask, bytes(rows * steps * S::values, sizeof(X)) + bytes(rows * Row::kRow, sizeof(X)) +
                                             bytes(kBlock * padded, sizeof(W)) + bytes((rows + 2) * kBlock, sizeof(float)) +
                                             2 * bytes(whole, sizeof(float)) + bytes(call.row_bytes, 1) +
                                             2 * bytes(state, sizeof(float)));
    q = take<X>(memory, rows * steps * S::values);
    shares = take<X>(memory, rows * Row::kRow);
    panels = take<W>(memory, kBlock * padded);
    scales = take<float>(memory, 2 * kBlock);
    scores = take<float>(memory, rows * kBlock);
    tops = take<float>(memory, whole);
    keep = take<float>(memory, whole);
    zeros = take<char>(memory, call.row_bytes);
    split = take<float>(memory, state);
    all = take<float>(memory, state);
    memset(zeros, 0, call.row_bytes);
  }
  static size_t bytes(int64_t count, size_t size) { return (count * size + 63) / 64 * 64; }
  template <class T>
  static T* take(char*& memory, int64_t count) {
    T* taken = (T*)memory;
    memory += bytes(count, sizeof(T));
    return taken;
  }
};

// The tile's key head in the page of a sequence's position, or null where its table names none.
const char* page_of(const Call& call, const Queries& tile, int64_t index) {
  const int64_t page = call.page_table[tile.sequence * call.table_stride + index];
  if (page < 0 || page >= call.pages) return nullptr;
  return (const char*)call.pool + (page * call.planes * call.kv_heads + tile.head) * call.page_tokens * call.row_bytes;
}

// Where the vectors of a block lie in their pages; where no row may see one, `hidden`.
void find(const Call& call, const Queries& tile, int64_t block, const char* hidden, Places& places) {
  const int64_t apart = call.planes == 1 ? 0 : call.kv_heads * call.page_tokens * call.row_bytes;
  const int64_t begin = tile.begin_key > block ? tile.begin_key - block : 0, end = at_most(tile.end_key - block, kBlock);
  for (const char*& row : places.rows) row = hidden;
  for (int64_t j = begin; j < end;) {
    const int64_t offset = (block + j) % call.page_tokens, last = at_most(j + call.page_tokens - offset, end);
    const char* page = page_of(call, tile, (block + j) / call.page_tokens);
    if (!page) j = last;
    for (const char* at = page + offset * call.row_bytes; j < last; j++, at += call.row_bytes)
      places.rows[j] = at, places.rows[kBlock + j] = at + apart;
  }
}

Scored scored(const Call& call, const Queries& tile, int64_t block, float* scores, int64_t r) {
  const int64_t position = tile.position(r);
  const int64_t begin = call.window ? position - call.window + 1 - block : 0;
  const int64_t end = call.end_key(tile.sequence, tile.token(r), position) - block;
  return {scores + r * kPanel, tile.rows * kPanel, begin < 0 ? 0 : at_most(begin, kBlock), end < 0 ? 0 : at_most(end, kBlock)};
}

// Whether a call's logits are its scores times the scale and nothing more.
bool is_plain(const Call& call) { return call.softcap == 0 && !call.slopes && !call.relative && call.scale > 0; }

// Turns raw scores into logits.
void to_logits(const Call& call, const Scored& row, int64_t head, int64_t distance) {
  const float slope = call.slopes ? call.slopes[head] : 0;
  const float* relative = call.relative ? call.relative + head * (2 * call.most + 1) : nullptr;
  for (int64_t j = 0; j < kBlock; j += lanes) {
    Floats s = Floats::load(row.at(j)) * Floats(call.scale);
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
    s.store(row.at(j));
  }
}

// Moves the rows' maxima on, and says in work.keep how much of what came before remains.
template <class Stored, class S>
void find_tops(const Call& call, const Queries& tile, int64_t block, const Work<S>& work, State state) {
  const bool plain = is_plain(call);
  for (int64_t r = 0; r < tile.rows; r++) {
    const Scored row = scored(call, tile, block, work.scores, r);
    float top = kMinusInfinity;
    if (row.begin < row.end) {
      if (Stored::scaled) row.multiply(work.scales);
      if (!plain) to_logits(call, row, tile.query_head(r), tile.position(r) - block);
      if (row.begin > 0 || row.end < kBlock) row.hide();
      // Scores that are no numbers are not the largest; beside a top that is a number their shares are NaN.
      const float most = row.most() * (plain ? call.scale : 1.0f);
      top = most > kLowest ? most : kLowest;
    }
    work.tops[r] = top > state.top[r] ? top : state.top[r];
  }
  for (int64_t r = 0; r < rounded_up(tile.rows, lanes); r += lanes) {
    const Floats before = Floats::load(state.top + r), now = Floats::load(work.tops + r);
    // Where no key was seen yet there is nothing to keep, whatever it is multiplied by.
    const Floats keep = exp(before - now);
    Floats(now.raw == before.raw ? Floats(1.0f).raw : keep.raw).store(work.keep + r);
    now.store(state.top + r);
  }
}

// Turns a row's scores into its shares of the block, and adds these to its sum.
template <class Stored, class S>
void share_out(const Call& call, const Queries& tile, int64_t block, const Work<S>& work, State state, int64_t r) {
  using Row = typename Work<S>::Row;
  const Scored row = scored(call, tile, block, work.scores, r);
  auto* shares = work.shares + r * Row::kRow;
  if (row.begin >= row.end) {
    memset(shares, 0, Row::kRow * sizeof *shares);
    return;
  }
  const Floats factor(is_plain(call) ? call.scale : 1.0f), top(-state.top[r]);
  Floats sums = Floats::load(state.total + r * lanes) * Floats(work.keep[r]);
  for (int64_t j = 0; j < kBlock; j += 2 * lanes, shares += 2 * lanes * Row::kRow / kBlock) {
    const Floats low = Row::of(fma(Floats::load(row.at(j)), factor, top));
    const Floats high = Row::of(fma(Floats::load(row.at(j + lanes)), factor, top));
    sums = sums + low;
    sums = sums + high;
    const float* scales = work.scales + kBlock + j;
    const auto scaled = [](Floats share, const float* by) { return Stored::scaled ? share * Floats::load(by) : share; };
    Row::put(shares, scaled(low, scales), scaled(high, scales + lanes));
  }
  sums.store(state.total + r * lanes);
}

// Advances the rows' states by a block of keys and values.
template <class Stored, class S>
void attend_block(const Call& call, const Queries& tile, int64_t block, const Work<S>& work, const Places& here,
                  const Places& next, State state) {
  const Foresight ahead{next, call.row_bytes};
  using W = typename S::Weight;
  constexpr int kRow = Work<S>::Row::kRow;
  const Packer<Stored> packer{work.panels, call.dim, call.page_tokens};
  const int64_t count = at_most(rounded_up(tile.end_key - block, lanes), kBlock);
  const Rows runs(tile.rows, kRows);
  packer.keys(here.keys(), count, ahead);
  for (int64_t p = 0; p * kPanel < count; p++)
    for (int64_t i = 0; i < runs.tiles; i++) {
      const W* panel = work.panels + p * work.steps * kPanel * S::inputs;
      kTiles<S>[runs.height(i)](panel, 0, work.q + runs.begin(i) * work.steps * S::values, work.steps,
                                work.scores + (p * tile.rows + runs.begin(i)) * kPanel, false,
                                i ? Ahead<W>{panel, 0} : ahead.during<W>(work.steps, p * kPanel / 2, (p + 1) * kPanel / 2));
    }
  if constexpr (Stored::scaled)
    for (int64_t i = 0; i < 2 * kBlock; i++) work.scales[i] = Stored::scale(here.rows[i], call.dim);
  find_tops<Stored>(call, tile, block, work, state);
  for (int64_t r = 0; r < tile.rows; r++) {
    ahead.fetch(kBlock + 24 + 16 * r / tile.rows, kBlock + 24 + 16 * (r + 1) / tile.rows);
    share_out<Stored>(call, tile, block, work, state, r);
  }
  packer.values(here.values(), count, call.value_dim, ahead);
  for (int64_t p = 0, panels = call.value_panels(); p < panels; p++)
    for (int64_t i = 0; i < runs.tiles; i++) {
      const W* panel = work.panels + p * kBlock * kPanel;
      float* out = state.out + (p * tile.rows + runs.begin(i)) * kPanel;
      for (int64_t r = 0; r < runs.height(i); r++)
        if (work.keep[runs.begin(i) + r] != 1) scale(out + r * kPanel, kPanel, work.keep[runs.begin(i) + r]);
      const int64_t first = kBlock / 2 + kBlock / 2 * p / panels, last = kBlock / 2 + kBlock / 2 * (p + 1) / panels;
      const bool asks = i == 0 && first < last;
      const Ahead<W> next_rows = asks ? ahead.during<W>(count / S::inputs, first, last) : Ahead<W>{panel, 0};
      kTiles<S, kRow>[runs.height(i)](panel, 0, work.shares + runs.begin(i) * kRow, count / S::inputs, out, true, next_rows);
    }
}

template <class Stored, class S>
void attend_split(const Call& call, const Queries& tile, int64_t split, const Work<S>& work, State state) {
  state.clear();
  int64_t block = split * kSplit;
  if (block < tile.begin_key) block = tile.begin_key / kBlock * kBlock;
  Places here, next;
  find(call, tile, block, work.zeros, here);
  for (; block < tile.end_key && block < (split + 1) * kSplit; block += kBlock) {
    find(call, tile, block + kBlock, work.zeros, next);
    attend_block<Stored, S>(call, tile, block, work, here, next, state);
    here = next;
  }
}

template <class S>
void load_queries(const Call& call, const Queries& tile, const Work<S>& work) {
  with_dtype(call.q_dtype, [&](auto type) {
    using Q = typename decltype(type)::type;
    if constexpr (std::is_same<typename S::X, float>::value || std::is_same<Q, Bfloat16>::value) {
      // Together, in the block's place: it comes later.
      Q* rows = (Q*)work.panels;
      const Rows runs(tile.rows, kRows);
      for (int64_t i = 0; i < runs.tiles; i++) {
        for (int64_t r = 0; r < runs.height(i); r++) {
          const int64_t row = runs.begin(i) + r;
          memcpy(rows + r * call.dim, (const Q*)call.q + tile.token(row) * call.q_token + tile.query_head(row) * call.q_head,
                 call.dim * sizeof(Q));
        }
        lay_out<kRows>(work.q + runs.begin(i) * work.steps * S::values, rows, call.dim, runs.height(i), 0, work.steps * S::inputs,
                       call.dim);
      }
    }
  });
}

void store_out(const Call& call, const Queries& tile, State state) {
  with_dtype(call.q_dtype, [&](auto type) {
    using Q = typename decltype(type)::type;
    for (int64_t r = 0; r < tile.rows; r++) {
      const int64_t head = tile.query_head(r);
      Q* to = (Q*)call.out + (tile.token(r) * call.q_heads + head) * call.value_dim;
      const Floats scale(state.scale(r, call.sinks ? call.sinks + head : nullptr));
      for (int64_t d = 0; d < call.value_dim; d += lanes) {
        const Floats y = Floats::load(state.out + (d / kPanel * tile.rows + r) * kPanel + d % kPanel) * scale;
        call.value_dim - d >= lanes ? y.store(to + d) : y.store(to + d, call.value_dim - d);
      }
    }
  });
}

// The keys that some row of a tile sees, and the splits that they lie in.
void find_keys(const Call& call, Queries& tile) {
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
int64_t list_tiles(const Call& call, Queries* tiles) {
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
          Queries& tile = tiles[count];
          tile = {n, head, head * group + first_head, heads, start + t, at_most(tokens - t, most) * heads,
                  call.contexts[n] - tokens + t, 0, 0, 0, 0, 0};
          find_keys(call, tile);
        }
  }
  return count;
}

template <class Stored, class S>
void attend_whole(const Call& call, const Queries& tile) {
  const Work<S> work(call, tile.rows);
  load_queries(call, tile, work);
  State all(work.all, tile.rows, call.value_panels()), split(work.split, tile.rows, call.value_panels());
  all.clear();
  for (int64_t s = 0; s < tile.splits; s++) {
    attend_split<Stored>(call, tile, tile.first_split + s, work, split);
    merge(all, split);
  }
  store_out(call, tile, all);
}

// One task per tile and split, then one per tile to merge.
template <class Stored, class S>
void attend_apart(const Call& call, Queries* tiles, int64_t count) {
  const int64_t panels = call.value_panels();
  size_t floats = 0;
  int64_t tasks = 0;
  for (int64_t i = 0; i < count; i++) {
    tiles[i].state = floats;
    floats += tiles[i].splits * State::floats(tiles[i].rows, panels);
    tasks += tiles[i].splits;
  }
  float* states = (float*)scratch(kCall, floats * sizeof(float));
  const auto state = [&](const Queries& tile, int64_t split) {
    return State(states + tile.state + split * State::floats(tile.rows, panels), tile.rows, panels);
  };
  parallel_for(tasks, [&](int64_t task) {
    int64_t i = 0;
    while (task >= tiles[i].splits) task -= tiles[i++].splits;
    const Queries& tile = tiles[i];
    const Work<S> work(call, tile.rows);
    load_queries(call, tile, work);
    attend_split<Stored>(call, tile, tile.first_split + task, work, state(tile, task));
  });
  parallel_for(count, [&](int64_t i) {
    const Queries& tile = tiles[i];
    State all((float*)scratch(kTask, State::floats(tile.rows, panels) * sizeof(float)), tile.rows, panels);
    all.clear();
    for (int64_t s = 0; s < tile.splits; s++) merge(all, state(tile, s));
    store_out(call, tile, all);
  });
}

// Calls f(Type<S>{}) with how a step multiplies what the pool's words become: pairs of bfloat16 where queries are such too, else
// float32.
template <class Stored, class F>
void with_products([[maybe_unused]] const Call& call, const F& f) {
  using W = typename Words<Stored>::Weight;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same<W, Bfloat16>::value)
    if (call.q_dtype == 1) return f(Type<Dot>{});
#endif
  f(Type<Widened<W>>{});
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
  Queries* tiles = (Queries*)scratch(kCallTable, count * sizeof(Queries));
  list_tiles(call, tiles);
  int64_t splits = 0;
  for (int64_t i = 0; i < count; i++) splits += tiles[i].splits;
  const bool apart = count < 4 * thread_count() && splits > count;
  with_stored_rows(pool_dtype, [&](auto rows) {
    using Stored = decltype(rows);
    with_products<Stored>(call, [&](auto step) {
      using S = typename decltype(step)::type;
      if (apart)
        attend_apart<Stored, S>(call, tiles, count);
      else
        parallel_for(count, [&](int64_t i) { attend_whole<Stored, S>(call, tiles[i]); });
    });
  });
}
