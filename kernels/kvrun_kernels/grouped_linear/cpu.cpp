// Runs of rows, each against a packed weight of its own. Tasks are (run, panels) of all runs together: a decode step's few
// experts keep every thread busy, and a weight streams past once for up to kSlab rows.
#include "panel.h"

namespace kvrun {
namespace {

// As laid out by op.py.
struct Group {
  int64_t start, stop;
  const void *panels, *bias;
};

struct Call {
  void* out;
  const void* x;
  const Group* groups;
  int64_t count, outputs, inputs, stride, x_dtype, bias_dtype;
};

// At most kSlab rows of one group, where their laid out x begins, and where their tasks do.
struct Run {
  Product product;
  Rows rows;
  int64_t x, pieces, tasks, panels;  // `panels` of a task
};

int64_t find(const Run* runs, int64_t count, int64_t Run::*begin, int64_t i) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (runs[middle].*begin <= i ? low : high) = middle;
  }
  return low;
}

// Multiplies runs that follow each other.
template <class S, class T>
void multiply_runs(Run* runs, int64_t count) {
  int64_t values = 0, pieces = 0, tasks = 0;
  for (int64_t i = 0; i < count; i++) {
    Run& run = runs[i];
    const int64_t panels = run.product.panel_count();
    run.x = values;
    run.pieces = pieces;
    run.tasks = tasks;
    run.panels = panels_of_a_task(run.rows, panels, count);
    values += run.rows.count * steps_of<S>(run.product.inputs) * S::values;
    pieces += Layout<S, T>{run.product, run.rows, nullptr}.count;
    tasks += (panels + run.panels - 1) / run.panels;
  }
  typename S::X* x = (typename S::X*)scratch(kCall, values * sizeof(typename S::X));
  const auto prepare = [&](int64_t i) {
    const Run& run = runs[find(runs, count, &Run::pieces, i)];
    Layout<S, T>{run.product, run.rows, x + run.x}.piece(i - run.pieces);
  };
  // Waking the others costs more than a few short rows.
  if (values < 32768)
    for (int64_t i = 0; i < pieces; i++) prepare(i);
  else
    parallel_for(pieces, prepare);
  parallel_for(tasks, [&](int64_t i) {
    const Run& run = runs[find(runs, count, &Run::tasks, i)];
    const int64_t first = (i - run.tasks) * run.panels, panels = run.product.panel_count();
    const int64_t last = first + run.panels < panels ? first + run.panels : panels;
    multiply<S>(run.product, run.rows, x + run.x, first, last, 0, run.rows.tiles);
  });
}

// Runs are taken together until they have kSlab rows: no more of x is laid out at once.
template <class S, class T>
void run_all(const Call& call) {
  int64_t most = 0;
  for (int64_t g = 0; g < call.count; g++) most += (call.groups[g].stop - call.groups[g].start + kSlab - 1) / kSlab;
  Run* runs = (Run*)scratch(kCallTable, most * sizeof(Run));
  int64_t count = 0, rows = 0;
  for (int64_t g = 0; g < call.count; g++) {
    const Group& group = call.groups[g];
    for (int64_t row = group.start; row < group.stop; row += kSlab) {
      const int64_t taken = group.stop - row < kSlab ? group.stop - row : kSlab;
      if (rows + taken > kSlab) {
        multiply_runs<S, T>(runs, count);
        count = rows = 0;
      }
      const Product product{(T*)call.out + row * call.outputs, (const T*)call.x + row * call.stride, group.panels, group.bias,
                            call.outputs, call.inputs, call.stride, call.x_dtype, call.bias_dtype};
      runs[count++] = {product, Rows(taken, kRows), 0, 0, 0, 0};
      rows += taken;
    }
  }
  if (count) multiply_runs<S, T>(runs, count);
}

}  // namespace
}  // namespace kvrun

KVRUN_OP(grouped_linear)
(void* out, const void* x, const void* groups, int64_t count, int64_t outputs, int64_t inputs, int64_t stride,
 int64_t x_dtype, int64_t weight_dtype, int64_t bias_dtype) {
  using namespace kvrun;
  const Call call{out, x, (const Group*)groups, count, outputs, inputs, stride, x_dtype, bias_dtype};
  with_step(x_dtype, weight_dtype, [&](auto step, auto x_type) {
    run_all<typename decltype(step)::type, typename decltype(x_type)::type>(call);
  });
}
