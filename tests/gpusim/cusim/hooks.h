// What AddressSanitizer and ThreadSanitizer must be told of stacks that change and of threads that wait for each other.
// The simulator's own files are compiled without a sanitizer, so that only the kernels' accesses are judged; the build
// says by CUSIM_ADDRESS or CUSIM_THREAD which one the kernels have.
#pragma once
#include <stddef.h>
#include <string.h>

#ifdef CUSIM_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CUSIM_THREAD
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace cusim {

// A stack as the sanitizers know it.
struct Known {
  const void* bottom = nullptr;
  size_t size = 0;
  void *frames = nullptr, *thread = nullptr;
};

inline void know_stack(Known& of, void* bottom, size_t size) {
  of.bottom = bottom, of.size = size;
#ifdef CUSIM_ADDRESS
  __asan_unpoison_memory_region(bottom, size);  // of the frames that a run before left
#endif
#ifdef CUSIM_THREAD
  if (!of.thread) of.thread = __tsan_create_fiber(0);
#endif
}
inline void know_scheduler(Known& of) {
#ifdef CUSIM_THREAD
  of.thread = __tsan_get_current_fiber();
#endif
  (void)of;
}
// Just before a switch.
inline void leave_stack(Known& from, const Known& to, bool for_good) {
#ifdef CUSIM_ADDRESS
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.frames, to.bottom, to.size);
#endif
#ifdef CUSIM_THREAD
  const unsigned kNoOrder = 1;
  __tsan_switch_to_fiber(to.thread, kNoOrder);
#endif
  (void)from, (void)to, (void)for_good;
}
// Just behind a switch. from: where it came from, or null when that is known.
inline void reach_stack(Known& to, Known* from) {
#ifdef CUSIM_ADDRESS
  __sanitizer_finish_switch_fiber(to.frames, from ? &from->bottom : nullptr, from ? &from->size : nullptr);
#endif
  (void)to, (void)from;
}

// What is done before a release comes before what is done behind an acquire of the same address.
inline void release(void* address) {
#ifdef CUSIM_THREAD
  __tsan_release(address);
#endif
  (void)address;
}
inline void acquire(void* address) {
#ifdef CUSIM_THREAD
  __tsan_acquire(address);
#endif
  (void)address;
}

// memcpy of the simulator's own, which ThreadSanitizer would watch though its caller is not compiled for it.
inline void copy_unwatched(void* to, const void* from, size_t bytes) {
#ifdef CUSIM_THREAD
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  memcpy(to, from, bytes);
#ifdef CUSIM_THREAD
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
}

}  // namespace cusim
