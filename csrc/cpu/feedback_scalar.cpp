// Rounding with error feedback: the baseline, whose sums the other levels repeat in the same order.
#include "cpu/kernels.h"

#include <cmath>

namespace cora::cpu::scalar {

void feedback(float* w, int rows, const float* u, int64_t ldu, int width, int64_t rest, const float* scale,
              const float* zero_point, float top, float* q, float* e) {
  constexpr int kRows = kFeedbackRows;
  const auto owe = [&](int k, int64_t j) {
    for (int r = 0; r < rows; ++r) w[j * kRows + r] -= e[k * kRows + r] * u[k * ldu + j];
  };
  for (int k = 0; k < width; ++k) {
    for (int at = k * kRows; at < k * kRows + rows; ++at) {
      float code = std::nearbyint(w[at] / scale[at]) + zero_point[at];
      code = code > 0.0f ? code : 0.0f;
      code = code < top ? code : top;
      q[at] = code;
      e[at] = (w[at] - scale[at] * (code - zero_point[at])) / u[k * ldu + k];
    }
    for (int j = k + 1; j < width; ++j) owe(k, j);
  }
  for (int64_t j = width; j < width + rest; ++j)
    for (int k = 0; k < width; ++k) owe(k, j);
}

}  // namespace cora::cpu::scalar
