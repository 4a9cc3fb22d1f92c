// silu(group_norm(x)) and its gradient. Contiguous images: a group of one image is one run of memory, read again from cache for each pass.
// Channels-last: chunks of pixels give sums per channel, merged per group, then every pixel is written. Sums of a block or chunk are
// fp32, what they add up to is fp64; the split is by shape alone, so that a result does not depend on the number of threads.
#include "common.h"
#include "groupnorm.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace LIGHTNINGDIT_LEVEL {

static const int64_t CHUNK = LIGHTNINGDIT_GROUPNORM_CHUNK;
static const int64_t BLOCK = 4096;  // elements whose sum may be taken in fp32

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// 1 / sqrt(x) in the precision of float, without libm.
static inline float inverse_root(double x) { return float(1.0 / __builtin_sqrt(x)); }

// The gradient to y = x_hat * w + b under silu: grad * s * (1 + y * (1 - s)).
static inline float grad_of_silu(float grad, float y) {
  const float sigmoid = 1.0f / (1.0f + exp_f32(-y));
  return grad * sigmoid * (1.0f + y * (1.0f - sigmoid));
}

// Where dy is kept between two passes over a group, since the exponential is what costs: in the result if that is fp32, else in a buffer
// of this thread's own.
static inline float* kept(float* grad_x, float*, int64_t, int64_t place) { return grad_x + place; }
template <typename Half>
static inline float* kept(Half*, float* scratch, int64_t members, int64_t) {
#ifdef _OPENMP
  return scratch + omp_get_thread_num() * members;
#else
  return scratch + 0 * members;
#endif
}

template <typename X, typename Out>
static void forward_contiguous(const X* x, const float* weight, const float* bias, Out* out, float* mean, float* rstd, int64_t batch,
                               int64_t channels, int64_t pixels, int64_t groups, float eps, int threads) {
  const int64_t width = channels / groups, members = width * pixels;
#pragma omp parallel for schedule(static) num_threads(threads_for(batch * channels * pixels, threads))
  for (int64_t item = 0; item < batch * groups; ++item) {
    const X* in = x + item * members;
    double total = 0.0, squares = 0.0;
    for (int64_t start = 0; start < members; start += BLOCK) {
      const int64_t count = smaller(BLOCK, members - start);
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < count; ++i) sum += load(in + start + i);
      total += sum;
    }
    const float centre = float(total / double(members));
    double drift = 0.0;  // what rounding the mean to fp32 left over
    for (int64_t start = 0; start < members; start += BLOCK) {
      const int64_t count = smaller(BLOCK, members - start);
      float sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum, square)
      for (int64_t i = 0; i < count; ++i) {
        const float d = load(in + start + i) - centre;
        sum += d;
        square += d * d;
      }
      drift += sum;
      squares += square;
    }
    drift /= double(members);
    const float scale = inverse_root(squares / double(members) - drift * drift + double(eps));
    mean[item] = centre;
    rstd[item] = scale;
    for (int64_t c = 0; c < width; ++c) {
      const int64_t channel = item % groups * width + c;
      const float w = weight[channel], b = bias[channel];
      const X* row = in + c * pixels;
      Out* result = out + item * members + c * pixels;
#pragma omp simd
      for (int64_t p = 0; p < pixels; ++p) {
        const float y = (load(row + p) - centre) * scale * w + b;
        store(result + p, y / (1.0f + exp_f32(-y)));
      }
    }
  }
}

template <typename Grad, typename X>
static void backward_contiguous(const Grad* grad, const X* x, const float* weight, const float* bias, const float* mean, const float* rstd,
                                X* grad_x, float* sums, float* scratch, int64_t batch, int64_t channels, int64_t pixels, int64_t groups,
                                int threads) {
  const int64_t width = channels / groups, members = width * pixels;
#pragma omp parallel for schedule(static) num_threads(threads_for(batch * channels * pixels, threads))
  for (int64_t item = 0; item < batch * groups; ++item) {
    const float centre = mean[item], scale = rstd[item];
    const int64_t first = item % groups * width, image = item / groups;
    float* dy = kept(grad_x, scratch, members, item * members);
    double offset = 0.0, slope = 0.0;
    for (int64_t c = 0; c < width; ++c) {
      const float w = weight[first + c], b = bias[first + c];
      const int64_t place = item * members + c * pixels;
      double total = 0.0, along = 0.0;
      for (int64_t start = 0; start < pixels; start += BLOCK) {
        const int64_t count = smaller(BLOCK, pixels - start);
        const Grad* incoming = grad + place + start;
        const X* row = x + place + start;
        float* out = dy + c * pixels + start;
        float sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : sum, product)
        for (int64_t p = 0; p < count; ++p) {
          const float x_hat = (load(row + p) - centre) * scale;
          const float d = grad_of_silu(load(incoming + p), x_hat * w + b);
          out[p] = d;
          sum += d;
          product += d * x_hat;
        }
        total += sum;
        along += product;
      }
      sums[image * channels + first + c] = float(total);
      sums[(batch + image) * channels + first + c] = float(along);
      offset += w * total;
      slope += w * along;
    }
    const float shift = float(offset / double(members)), tilt = float(slope / double(members));
    for (int64_t c = 0; c < width; ++c) {
      const float w = weight[first + c];
      const float* d = dy + c * pixels;
      const X* row = x + item * members + c * pixels;
      X* result = grad_x + item * members + c * pixels;
#pragma omp simd
      for (int64_t p = 0; p < pixels; ++p) {
        const float x_hat = (load(row + p) - centre) * scale;
        store(result + p, scale * (d[p] * w - shift - x_hat * tilt));
      }
    }
  }
}

template <typename X, typename Out>
static void forward_channels_last(const X* x, const float* weight, const float* bias, Out* out, float* mean, float* rstd, float* scratch,
                                  int64_t batch, int64_t channels, int64_t pixels, int64_t groups, float eps, int threads) {
  const int64_t width = channels / groups, chunks = (pixels + CHUNK - 1) / CHUNK;
  float* spread = scratch + batch * chunks * 2 * channels;  // mean and rstd of every channel, (batch, 2, channels)
#pragma omp parallel num_threads(threads_for(batch * channels * pixels, threads))
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < batch * chunks; ++item) {
      // Mean and squared deviations of every channel, shifted by the chunk's first pixel: a large mean cancels before it is squared.
      const int64_t start = item % chunks * CHUNK, count = smaller(CHUNK, pixels - start);
      const X* first = x + (item / chunks * pixels + start) * channels;
      float* total = scratch + item * 2 * channels;
      float* square = total + channels;
      for (int64_t c = 0; c < channels; ++c) total[c] = square[c] = 0.0f;
      for (int64_t p = 1; p < count; ++p) {
        const X* row = first + p * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const float d = load(row + c) - load(first + c);
          total[c] += d;
          square[c] += d * d;
        }
      }
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const float average = total[c] / float(count);
        square[c] -= total[c] * average;
        total[c] = load(first + c) + average;
      }
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < batch * groups; ++item) {
      const int64_t image = item / groups, channel = item % groups * width;
      double total = 0.0, squares = 0.0;
      for (int64_t k = 0; k < chunks; ++k)
        for (int64_t c = 0; c < width; ++c)
          total += double(smaller(CHUNK, pixels - k * CHUNK)) * scratch[(image * chunks + k) * 2 * channels + channel + c];
      const double centre = total / double(width * pixels);
      for (int64_t k = 0; k < chunks; ++k)
        for (int64_t c = 0; c < width; ++c) {
          const float* part = scratch + (image * chunks + k) * 2 * channels + channel + c;
          const double away = part[0] - centre;
          squares += part[channels] + double(smaller(CHUNK, pixels - k * CHUNK)) * away * away;
        }
      mean[item] = float(centre);
      rstd[item] = inverse_root(squares / double(width * pixels) + double(eps));
      for (int64_t c = 0; c < width; ++c) {
        spread[image * 2 * channels + channel + c] = mean[item];
        spread[(image * 2 + 1) * channels + channel + c] = rstd[item];
      }
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < batch * chunks; ++item) {
      const int64_t image = item / chunks, start = item % chunks * CHUNK, count = smaller(CHUNK, pixels - start);
      const float* centre = spread + image * 2 * channels;
      const float* scale = centre + channels;
      for (int64_t p = 0; p < count; ++p) {
        const X* row = x + (image * pixels + start + p) * channels;
        Out* result = out + (image * pixels + start + p) * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const float y = (load(row + c) - centre[c]) * scale[c] * weight[c] + bias[c];
          store(result + c, y / (1.0f + exp_f32(-y)));
        }
      }
    }
  }
}

template <typename Grad, typename X>
static void backward_channels_last(const Grad* grad, const X* x, const float* weight, const float* bias, const float* mean,
                                   const float* rstd, X* grad_x, float* sums, float* scratch, int64_t batch, int64_t channels,
                                   int64_t pixels, int64_t groups, int threads) {
  const int64_t width = channels / groups, chunks = (pixels + CHUNK - 1) / CHUNK;
  float* spread = scratch + batch * chunks * 2 * channels;  // mean, rstd and both group means of every channel, (batch, 4, channels)
#pragma omp parallel num_threads(threads_for(batch * channels * pixels, threads))
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < batch * channels; ++item) {
      const int64_t image = item / channels, channel = item % channels, group = image * groups + channel / width;
      spread[image * 4 * channels + channel] = mean[group];
      spread[(image * 4 + 1) * channels + channel] = rstd[group];
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < batch * chunks; ++item) {
      const int64_t image = item / chunks, start = item % chunks * CHUNK, count = smaller(CHUNK, pixels - start);
      const float* centre = spread + image * 4 * channels;
      const float* scale = centre + channels;
      float* total = scratch + item * 2 * channels;
      float* along = total + channels;
      for (int64_t c = 0; c < channels; ++c) total[c] = along[c] = 0.0f;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t place = (image * pixels + start + p) * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const float x_hat = (load(x + place + c) - centre[c]) * scale[c];
          const float d = grad_of_silu(load(grad + place + c), x_hat * weight[c] + bias[c]);
          total[c] += d;
          along[c] += d * x_hat;
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < batch * groups; ++item) {
      const int64_t image = item / groups, channel = item % groups * width;
      double offset = 0.0, slope = 0.0;
      for (int64_t c = channel; c < channel + width; ++c) {
        double total = 0.0, along = 0.0;
        for (int64_t k = 0; k < chunks; ++k) {
          total += scratch[(image * chunks + k) * 2 * channels + c];
          along += scratch[((image * chunks + k) * 2 + 1) * channels + c];
        }
        sums[image * channels + c] = float(total);
        sums[(batch + image) * channels + c] = float(along);
        offset += weight[c] * total;
        slope += weight[c] * along;
      }
      for (int64_t c = channel; c < channel + width; ++c) {
        spread[(image * 4 + 2) * channels + c] = float(offset / double(width * pixels));
        spread[(image * 4 + 3) * channels + c] = float(slope / double(width * pixels));
      }
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < batch * chunks; ++item) {
      const int64_t image = item / chunks, start = item % chunks * CHUNK, count = smaller(CHUNK, pixels - start);
      const float* centre = spread + image * 4 * channels;
      const float* scale = centre + channels;
      const float* shift = scale + channels;
      const float* tilt = shift + channels;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t place = (image * pixels + start + p) * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const float x_hat = (load(x + place + c) - centre[c]) * scale[c];
          const float d = grad_of_silu(load(grad + place + c), x_hat * weight[c] + bias[c]);
          store(grad_x + place + c, scale[c] * (d * weight[c] - shift[c] - x_hat * tilt[c]));
        }
      }
    }
  }
}

LIGHTNINGDIT_GROUPNORM_FORWARD(groupnorm_forward) {
  return with_types(x_dtype, out_dtype, [=](auto a, auto b) {
    const decltype(a)* from = (const decltype(a)*)x;
    decltype(b)* to = (decltype(b)*)out;
    if (channels_last)
      forward_channels_last(from, weight, bias, to, mean, rstd, scratch, batch, channels, pixels, groups, eps, threads);
    else
      forward_contiguous(from, weight, bias, to, mean, rstd, batch, channels, pixels, groups, eps, threads);
    return int(LIGHTNINGDIT_OK);
  });
}

LIGHTNINGDIT_GROUPNORM_BACKWARD(groupnorm_backward) {
  return with_types(grad_dtype, x_dtype, [=](auto a, auto b) {
    const decltype(a)* from = (const decltype(a)*)grad;
    const decltype(b)* at = (const decltype(b)*)x;
    decltype(b)* to = (decltype(b)*)grad_x;
    if (channels_last)
      backward_channels_last(from, at, weight, bias, mean, rstd, to, sums, scratch, batch, channels, pixels, groups, threads);
    else
      backward_contiguous(from, at, weight, bias, mean, rstd, to, sums, scratch, batch, channels, pixels, groups, threads);
    return int(LIGHTNINGDIT_OK);
  });
}

}  // namespace LIGHTNINGDIT_LEVEL
