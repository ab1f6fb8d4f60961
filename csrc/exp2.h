// 2^z for z <= 0, in fp32: of the tails of a distribution, and of scores below their maximum.
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

}  // namespace blip2_kernels
