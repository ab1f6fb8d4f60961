// Runs CUDA kernels on the CPU: what a kernel's source needs of CUDA, and a launch, block after block.
//
// By default each CUDA thread is a fiber of one thread: fast, and the order is known (warps in turn; every
// other block begins with the last warp), so a missing barrier shows as a wrong result. With
// CUDA_ON_HOST_THREADS each is a thread of its own, which the sanitizers watch. A barrier that only some
// threads reach, and a warp that is not whole at a shuffle, end the run.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_host {

constexpr unsigned kWarp = 32;

struct Index {
  dim3 thread, block, block_size, grid_size;
};
inline thread_local Index index;

// How many blocks of a grid run along each of its sides, the last ones; 0 for all.
inline unsigned last_blocks = 0;

// What the lanes of a warp hand one another.
struct Mailbox {
  unsigned char slot[kWarp][16];
};

void meet_block();
void meet_warp();
Mailbox& mailbox();

template <class T>
T from_lane_xor(T value, int mask) {
  static_assert(sizeof(T) <= 16);
  const unsigned lane = index.thread.x % kWarp;
  memcpy(mailbox().slot[lane], &value, sizeof(T));
  meet_warp();
  T received;
  memcpy(&received, mailbox().slot[lane ^ mask], sizeof(T));
  meet_warp();  // nobody writes again before everybody has read
  return received;
}

}  // namespace cuda_on_host

#ifdef CUDA_ON_HOST_THREADS

#include <barrier>
#include <thread>

#define __shared__ static

namespace cuda_on_host {

struct Block {
  std::barrier<> whole;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<Mailbox> mailboxes;

  explicit Block(unsigned threads) : whole(threads), mailboxes((threads + kWarp - 1) / kWarp) {
    for (unsigned first = 0; first < threads; first += kWarp)
      warps.push_back(std::make_unique<std::barrier<>>(std::min(kWarp, threads - first)));
  }
};
inline Block* block;

inline void meet_block() { block->whole.arrive_and_wait(); }
inline void meet_warp() { block->warps[index.thread.x / kWarp]->arrive_and_wait(); }
inline Mailbox& mailbox() { return block->mailboxes[index.thread.x / kWarp]; }

inline void run(dim3 grid, dim3 size, const std::function<void()>& kernel) {
  // Starting a thread costs far more than a block: the same threads run all blocks, one after the other.
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned i = 0; i < grid.x * grid.y; ++i) blocks.push_back(std::make_unique<Block>(size.x));
  std::barrier<> next(size.x);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < size.x; ++t)
    threads.emplace_back([&, t] {
      for (unsigned i = 0; i < grid.x * grid.y; ++i) {
        if (t == 0) block = blocks[i].get();
        next.arrive_and_wait();
        index = {dim3(t), dim3(i % grid.x, i / grid.x), size, grid};
        kernel();
        // As on a GPU, whoever has left is not waited for.
        blocks[i]->warps[t / kWarp]->arrive_and_drop();
        blocks[i]->whole.arrive_and_drop();
        next.arrive_and_wait();
      }
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace cuda_on_host

#else

#include <ucontext.h>

#define __shared__ static thread_local

namespace cuda_on_host {

enum class State { READY, AT_BLOCK, AT_WARP, DONE };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  State state = State::READY;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Mailbox> mailboxes;
  ucontext_t scheduler;
  unsigned current = 0;
  const std::function<void()>* kernel = nullptr;

  explicit Block(unsigned threads) : fibers(threads), mailboxes((threads + kWarp - 1) / kWarp) {}

  unsigned warps() const { return unsigned(mailboxes.size()); }

  template <class Visit>
  void each_of_warp(unsigned warp, const Visit& visit) {
    const unsigned last = std::min(unsigned(fibers.size()), (warp + 1) * kWarp);
    for (unsigned t = warp * kWarp; t < last; ++t) visit(t, fibers[t]);
  }

  void wait(State state) {
    const unsigned me = current;
    fibers[me].state = state;
    swapcontext(&fibers[me].context, &scheduler);
    index.thread = dim3(me);
  }

  void resume(unsigned thread) {
    current = thread;
    index.thread = dim3(thread);
    swapcontext(&scheduler, &fibers[thread].context);
  }

  // Runs a warp until all its threads are done or wait for the block; false where nothing could be run.
  bool run_warp(unsigned warp) {
    bool ran_any = false;
    for (;;) {
      bool ran = false;
      unsigned alive = 0, waiting = 0;
      each_of_warp(warp, [&](unsigned t, Fiber& fiber) {
        if (fiber.state == State::READY) resume(t), ran = true;
        alive += fiber.state != State::DONE;
        waiting += fiber.state == State::AT_WARP;
      });
      ran_any = ran_any || ran;
      if (waiting && waiting == alive) {
        each_of_warp(warp, [](unsigned, Fiber& fiber) {
          if (fiber.state == State::AT_WARP) fiber.state = State::READY;
        });
      } else if (waiting) {
        if (!ran) throw std::runtime_error("a warp is not whole at a shuffle");
      } else if (!ran) {
        return ran_any;
      }
    }
  }

  void run() {
    for (;;) {
      bool ran = false;
      for (unsigned i = 0; i < warps(); ++i) ran |= run_warp(index.block.x % 2 ? warps() - 1 - i : i);
      unsigned alive = 0, waiting = 0;
      for (const Fiber& fiber : fibers) {
        alive += fiber.state != State::DONE;
        waiting += fiber.state == State::AT_BLOCK;
      }
      if (!alive) return;
      if (waiting == alive && alive != fibers.size())
        throw std::runtime_error("__syncthreads was reached by some threads while others had left");
      if (waiting != alive && !ran)
        throw std::runtime_error("__syncthreads was reached by some threads only");
      if (waiting == alive)
        for (Fiber& fiber : fibers) fiber.state = State::READY;
    }
  }
};
inline thread_local Block* block;

inline void meet_block() { block->wait(State::AT_BLOCK); }
inline void meet_warp() { block->wait(State::AT_WARP); }
inline Mailbox& mailbox() { return block->mailboxes[index.thread.x / kWarp]; }

inline void enter_kernel() {
  (*block->kernel)();
  block->fibers[block->current].state = State::DONE;
  swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

inline void run(dim3 grid, dim3 size, const std::function<void()>& kernel) {
  Block own(size.x);
  own.kernel = &kernel;
  block = &own;
  const auto first = [](unsigned count) {
    return last_blocks && last_blocks < count ? count - last_blocks : 0;
  };
  for (unsigned y = first(grid.y); y < grid.y; ++y)
    for (unsigned x = first(grid.x); x < grid.x; ++x) {
      index = {dim3(0), dim3(x, y), size, grid};
      for (Fiber& fiber : own.fibers) {
        fiber.state = State::READY;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter_kernel, 0);
      }
      own.run();
    }
}

}  // namespace cuda_on_host

#endif

#define threadIdx cuda_on_host::index.thread
#define blockIdx cuda_on_host::index.block
#define blockDim cuda_on_host::index.block_size
#define gridDim cuda_on_host::index.grid_size
#define __syncthreads() cuda_on_host::meet_block()
#define __shfl_xor_sync(mask, value, distance) cuda_on_host::from_lane_xor(value, distance)
