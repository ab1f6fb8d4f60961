// The Gaussian error linear unit in its exact form, x * Phi(x), and its derivative, in fp32.
#pragma once

#include "platform.h"

namespace blip2_kernels {

// 2^z for z <= 0, to 2 units in the last place; 0 where a normal number ends.
HOST_DEVICE float exp2_of_negative(float z) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z));
  return power;
#else
  const float bounded = z > -126.0f ? z : -126.0f;
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  const float whole = (bounded + round) - round;
  const float f = bounded - whole;
  // Minimax on [-0.5, 0.5], relative error 2e-9.
  float power = 1.534578573e-4f;
  power = power * f + 1.339994336e-3f;
  power = power * f + 9.618489147e-3f;
  power = power * f + 5.550328749e-2f;
  power = power * f + 2.402264689e-1f;
  power = power * f + 6.931472057e-1f;
  power = power * f + 1.0f;
  power *= bit_cast<float>((int32_t(whole) + 127) << 23);
  return z > -126.0f ? power : 0.0f;
#endif
}

HOST_DEVICE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));  // 1 unit in the last place, one instruction
  return inverse;
#else
  return 1.0f / x;
#endif
}

// Distribution function and density of the standard normal distribution.
struct Normal {
  float cdf;
  float pdf;
};

HOST_DEVICE Normal normal(float x) {
  const float t = fabsf(x);
  const float bell = exp2_of_negative(t * t * -0.72134752044448f);  // exp(-t^2 / 2)
  // Phi(-t) = exp(-t^2 / 2) P(u), u = 1 / (1 + 0.26 t). P is minimax for the error of x * Phi(x), 5e-8, and
  // for that of Phi relative to Phi, 1.3e-6. Nothing cancels, unlike in 1 + erf(x).
  const float u = reciprocal(1.0f + 0.26f * t);
  float p = -7.338503867e-2f;
  p = p * u + 2.304963288e-1f;
  p = p * u - 1.086461946e-1f;
  p = p * u + 1.680547167e-1f;
  p = p * u + 7.266104197e-2f;
  p = p * u + 1.073135712e-1f;
  p = p * u + 1.035056105e-1f;
  const float tail = bell * (p * u);
  return {x < 0 ? tail : 1.0f - tail, bell * 0.39894228040143f};
}

HOST_DEVICE float gelu(float x) { return x * normal(x).cdf; }

HOST_DEVICE float gelu_gradient(float x) {
  const Normal n = normal(x);
  return n.cdf + x * n.pdf;
}

}  // namespace blip2_kernels
