// How an operator's file registers what runs it: on CPU tensors, and on CUDA tensors where CUDA was built in.
#pragma once

#include <torch/csrc/stable/library.h>

// The tests build the operators a second time, with CUDA kernels that run on the host, under another name.
#ifndef BLIP2_KERNELS_NAMESPACE
#define BLIP2_KERNELS_NAMESPACE blip2_kernels
#endif

#define BLIP2_KERNELS_IMPLEMENT_ON(key, name, function)              \
  STABLE_TORCH_LIBRARY_IMPL(BLIP2_KERNELS_NAMESPACE, key, library) { \
    library.impl(name, TORCH_BOX(&function));                        \
  }

#ifdef BLIP2_KERNELS_CUDA
#define BLIP2_KERNELS_IMPLEMENT(name, function)   \
  BLIP2_KERNELS_IMPLEMENT_ON(CPU, name, function) \
  BLIP2_KERNELS_IMPLEMENT_ON(CUDA, name, function)
#else
#define BLIP2_KERNELS_IMPLEMENT(name, function) BLIP2_KERNELS_IMPLEMENT_ON(CPU, name, function)
#endif
