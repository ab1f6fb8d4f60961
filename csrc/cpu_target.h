// Compiles a loop for several instruction sets and runs the best one this processor has.
//
//   run_for_this_processor([&]() ALWAYS_INLINE { rows(…); });
//
// Whatever the lambda calls is inlined into a function for AVX-512, another for AVX2 and one for the
// baseline; the compiler vectorises each with the registers it may use.
//
// With BLIP2_KERNELS_TARGET there is that one alone: the tests run, and read, what other processors get.
#pragma once

#if defined(__GNUC__)
#define ALWAYS_INLINE __attribute__((always_inline))
#else
#define ALWAYS_INLINE
#endif

#if defined(__GNUC__) && defined(__x86_64__)
#define BLIP2_KERNELS_TARGETS 1
#endif

namespace blip2_kernels {

template <class Body>
#if defined(__GNUC__)
[[gnu::flatten, gnu::noinline]]
#endif
void run_baseline(const Body& body) {
  body();
}

#ifdef BLIP2_KERNELS_TARGETS

template <class Body>
[[gnu::flatten, gnu::noinline, gnu::target("avx2,fma,bmi2")]]
void run_avx2(const Body& body) {
  body();
}

// Registers of 512 bits are asked for: left alone, the compiler keeps to 256.
template <class Body>
[[gnu::flatten, gnu::noinline,
  gnu::target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=512")]]
void run_avx512(const Body& body) {
  body();
}

enum class Target { BASELINE, AVX2, AVX512 };

#ifdef BLIP2_KERNELS_TARGET

constexpr Target this_processor() { return Target::BLIP2_KERNELS_TARGET; }

#else

inline Target this_processor() {
  static const Target target = [] {
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? Target::AVX512 : avx2 ? Target::AVX2 : Target::BASELINE;
  }();
  return target;
}

#endif

template <class Body>
void run_for_this_processor(const Body& body) {
  switch (this_processor()) {
    case Target::AVX512: return run_avx512(body);
    case Target::AVX2: return run_avx2(body);
    case Target::BASELINE: return run_baseline(body);
  }
}

#else

template <class Body>
void run_for_this_processor(const Body& body) {
  run_baseline(body);
}

#endif

}  // namespace blip2_kernels
