// Runs the planted kernel and checks what it computed. Prints "ok", or what is wrong.
#include "planted.cuh"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <memory>

int main() {
  constexpr int rows = 4, columns = 200;
  // Of exactly this size, so that ASan sees an access past the end.
  std::unique_ptr<float[]> x(new float[rows * columns]), y(new float[rows * columns]);
  for (int i = 0; i < rows * columns; ++i) x[i] = std::sin(float(i * i));
  int rows_begun[rows] = {};
  try {
    planted::launch_normalize_rows(x.get(), y.get(), rows_begun, rows, columns, nullptr);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }

  double worst = 0;  // error relative to the larger of 1 and the exact value
  for (int r = 0; r < rows; ++r) {
    const float* row = &x[r * columns];
    double mean = 0, variance = 0;
    for (int i = 0; i < columns; ++i) mean += row[i] / double(columns);
    for (int i = 0; i < columns; ++i) variance += std::pow(row[i] - mean, 2) / columns;
    for (int i = 0; i < columns; ++i) {
      const double exact = (row[i] - mean) / std::sqrt(variance);
      const double error = std::abs(y[r * columns + i] - exact) / std::max(1.0, std::abs(exact));
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
  }
  // A float sum of n terms errs by about sqrt(n) * eps; 4 for unlucky draws, as in numerics.py.
  const double tolerance = 4 * std::sqrt(double(columns)) * FLT_EPSILON;
  const int begun = std::count(rows_begun, rows_begun + rows, 1);
  if (worst > tolerance || begun != rows) {
    std::printf("wrong: error %g, tolerance %g; %d of %d rows\n", worst, tolerance, begun, rows);
    return 1;
  }
  std::printf("ok\n");
}
