// Runs of rows, each against a packed weight of its own, shared by all threads together. A product alone is one run; the
// experts of a mixture are many. Tasks are (run, panels, tiles) of all runs: a decode step's few experts keep every thread busy,
// and a weight streams past once for all rows of a run.
//
// A product P is a weight and where its rows lie:
//   panel_count(), padded()          how many panels it has, and how many inputs a row is laid out with
//   bytes(rows), pieces(rows)        what these rows take laid out, and in how many pieces threads can share that work
//   prepare(rows, x, piece)          lays one piece out at x
//   multiply(rows, x, across, down)  multiplies adjacent panels with adjacent tiles of rows
//   panels_at_once(height)           panels that stream side by side for a tile of so many rows
#pragma once

#include "rows.h"

namespace kvrun {
namespace {

struct Span {
  int64_t first, last;
};

template <class P>
struct Run {
  P product;
  Rows rows;
  int64_t x, pieces, tasks;       // where its laid out rows, its pieces and its tasks begin
  int64_t panels, across, cuts;  // panels of a task, tasks side by side, and parts of its tiles
};

template <class P>
const Run<P>& find(const Run<P>* runs, int64_t count, int64_t Run<P>::*begin, int64_t i) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (runs[middle].*begin <= i ? low : high) = middle;
  }
  return runs[low];
}

// Multiplies runs that are taken together.
template <class P>
void multiply_runs(Run<P>* runs, int64_t count) {
  const int64_t enough = 8 * thread_count();
  int64_t bytes = 0, values = 0, pieces = 0, across = 0, tasks = 0;
  for (int64_t i = 0; i < count; i++) {
    Run<P>& run = runs[i];
    run.x = bytes;
    run.pieces = pieces;
    bytes += (run.product.bytes(run.rows) + 63) / 64 * 64;
    values += run.rows.count * run.product.padded();
    pieces += run.product.pieces(run.rows);
    const int64_t panels = run.product.panel_count();
    run.panels = run.rows.tiles == 1 ? P::panels_at_once(run.rows.height(0)) : 8;
    while (run.panels > 1 && panels * count < run.panels * enough) run.panels /= 2;
    run.across = (panels + run.panels - 1) / run.panels;
    across += run.across;
  }
  for (int64_t i = 0; i < count; i++) {
    Run<P>& run = runs[i];
    run.cuts = across < enough ? enough / across : 1;
    if (run.cuts > run.rows.tiles) run.cuts = run.rows.tiles;
    run.tasks = tasks;
    tasks += run.across * run.cuts;
  }
  uint8_t* x = (uint8_t*)scratch(kCall, bytes);
  const auto prepare = [&](int64_t i) {
    const Run<P>& run = find(runs, count, &Run<P>::pieces, i);
    run.product.prepare(run.rows, x + run.x, i - run.pieces);
  };
  // Waking the others costs more than a few short rows.
  if (values < 32768)
    for (int64_t i = 0; i < pieces; i++) prepare(i);
  else
    parallel_for(pieces, prepare);
  parallel_for(tasks, [&](int64_t i) {
    const Run<P>& run = find(runs, count, &Run<P>::tasks, i);
    const int64_t first = (i - run.tasks) / run.cuts * run.panels, cut = (i - run.tasks) % run.cuts;
    const int64_t panels = run.product.panel_count(), tiles = run.rows.tiles;
    run.product.multiply(run.rows, x + run.x, Span{first, first + run.panels < panels ? first + run.panels : panels},
                         Span{tiles * cut / run.cuts, tiles * (cut + 1) / run.cuts});
  });
}

// Multiplies rows bounds[g] to bounds[g + 1] with product_of(g, first row), for every g below `groups`. Runs are taken together
// until they have `most` rows: no more of x is laid out at once. A group without rows costs nothing.
template <class F>
void multiply_groups(const int64_t* bounds, int64_t groups, int64_t most, int64_t tallest, const F& product_of) {
  using P = decltype(product_of(0, 0));
  int64_t count = 0, rows = 0;
  for (int64_t g = 0; g < groups; g++) count += (bounds[g + 1] - bounds[g] + most - 1) / most;
  Run<P>* runs = (Run<P>*)scratch(kCallTable, count * sizeof(Run<P>));
  count = 0;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t row = bounds[g]; row < bounds[g + 1]; row += most) {
      const int64_t taken = bounds[g + 1] - row < most ? bounds[g + 1] - row : most;
      if (rows + taken > most) {
        multiply_runs(runs, count);
        count = rows = 0;
      }
      runs[count++] = {product_of(g, row), Rows(taken, tallest), 0, 0, 0, 0, 0, 0};
      rows += taken;
    }
  if (count) multiply_runs(runs, count);
}

}  // namespace
}  // namespace kvrun
