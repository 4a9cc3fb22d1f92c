/* A CUDA driver, runtime, cuBLAS, cuSOLVER and cuDNN for a machine without a GPU.

   It stands for one Hopper card. Memory is address space that is reserved and never touched, so
   hundreds of GiB can be allocated, up to the card's size. Launches are checked and counted, and not
   run. stand_in.py builds it: it adds a function that returns success for every other symbol of these
   libraries that PyTorch or Triton asks for.

   STAND_IN_GIB, STAND_IN_NAME: memory and name of the card. STAND_IN_MEMORY: a file in which the
   processes that share the card count what each of them holds; without it a process has the card for
   itself. STAND_IN_TRACE: a file name to which the process id is appended; it gets one line a
   launch. */
#define _GNU_SOURCE
#include <assert.h>
#include <dlfcn.h>
#include <driver_types.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Status codes that PyTorch tells apart (cudaError_t and CUresult share these numbers). */
enum {
  OK = 0,
  INVALID_ARGUMENT = 1,
  OUT_OF_MEMORY = 2,
  INVALID_LAUNCH = 9,
  INVALID_DEVICE = 101,
  ILLEGAL_STATE = 401,
  NOT_SUPPORTED = 801,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURE_MERGE = 902,
  CAPTURE_UNMATCHED = 903,
  CAPTURE_UNJOINED = 904,
  CAPTURE_ISOLATION = 905,
  CAPTURE_IMPLICIT = 906,
  CAPTURED_EVENT = 907,
  CAPTURE_WRONG_THREAD = 908,
};
enum { CUDNN_NOT_SUPPORTED = 3000, CUPTI_MAX_LIMIT_REACHED = 12 };
enum { CUDA_VERSION = 13000, CUBLAS_VERSION = 130000, CUPTI_VERSION = 130000 };

/* The card: an H100 or H200 (CUDA C++ Programming Guide, compute capability 9.0). */
enum {
  SHARED_MEMORY_OF_A_BLOCK = 232448, /* bytes, opt-in */
  THREADS_OF_A_BLOCK = 1024,
  GRID_YZ = 65535,
  MULTIPROCESSORS = 132,
  L2_BYTES = 50 << 20,
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int last_error;
static int64_t capacity; /* bytes */

int stand_in_ok(void) { return OK; }

static int fail(int code) {
  last_error = code;
  return code;
}

static int complain(int code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("stand-in CUDA driver: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  return fail(code);
}

__attribute__((constructor)) static void read_environment(void) {
  const char *gib = getenv("STAND_IN_GIB");
  capacity = (int64_t)((gib ? atof(gib) : 79.2) * (1 << 30));
}

/* ---- Streams, and the trace of what is launched on them. ---- */

enum { STREAMS_OF_A_CAPTURE = 64 };

/* A point in a capture: how much of the work of each of its streams comes before. */
typedef struct {
  unsigned long long capture;         /* id, 0: outside of a capture */
  int64_t work[STREAMS_OF_A_CAPTURE]; /* launches, by the number of the stream */
} Point;

typedef struct Stream {
  int priority, invalid;
  unsigned flags;   /* cudaStreamNonBlocking: PyTorch's are */
  int number;       /* of the stream in the capture; 0: the origin, where the capture began */
  int mode;         /* of the origin: cudaStreamCaptureMode */
  pthread_t thread; /* of the origin: which began the capture */
  Point end;        /* after all that was launched on it */
  double clock_us;  /* invented time, for events */
  struct Stream *next;
} Stream;

static Stream legacy; /* the default stream */
static Stream *streams = &legacy;
static __thread int thread_mode = cudaStreamCaptureModeGlobal;
static unsigned long long next_capture = 1;

static Stream *stream_of(void *handle) {
  return (uintptr_t)handle <= 2 ? &legacy : handle; /* 0, 1 and 2 name default streams */
}

static int capturing(const Stream *stream) { return stream->end.capture != 0; }

static void invalidate(unsigned long long capture) {
  for (Stream *one = streams; one; one = one->next)
    if (one->end.capture == capture) one->invalid = 1;
}

static FILE *trace(void) {
  static FILE *file;
  static int tried;
  if (tried) return file; /* opened at the first launch: most processes have none */
  const char *path = getenv("STAND_IN_TRACE");
  if (path && *path) {
    char name[4096];
    snprintf(name, sizeof name, "%s.%d", path, getpid());
    file = fopen(name, "a");
    if (file) setvbuf(file, NULL, _IOLBF, 0);
  }
  tried = 1;
  return file;
}

/* Invalidates the captures of streams for which `concerned` holds; returns whether there are any. */
static int invalidate_where(int (*concerned)(const Stream *)) {
  int found = 0;
  for (Stream *one = streams; one; one = one->next) {
    if (!capturing(one) || !concerned(one)) continue;
    invalidate(one->end.capture);
    found = 1;
  }
  return found;
}

static int is_any(const Stream *stream) { return 1; }
static int is_blocking(const Stream *stream) { return !(stream->flags & cudaStreamNonBlocking); }

/* Whether its capture forbids unsafe calls to this thread: its own that are not relaxed do and, where
   the thread is in global mode, global ones of others. */
static int forbids_unsafe_calls(const Stream *stream) {
  int relaxed = cudaStreamCaptureModeRelaxed, global = cudaStreamCaptureModeGlobal;
  if (stream->number || stream->mode == relaxed || thread_mode == relaxed) return 0;
  if (stream->mode == global && thread_mode == global) return 1;
  return pthread_equal(stream->thread, pthread_self());
}

static int forbidden_in_capture(const char *what) {
  if (!invalidate_where(forbids_unsafe_calls)) return OK;
  return complain(CAPTURE_UNSUPPORTED, "%s during a capture", what);
}

static int wait_for(Stream *stream, const char *what) {
  if (!capturing(stream)) return forbidden_in_capture(what);
  invalidate(stream->end.capture);
  return complain(CAPTURE_UNSUPPORTED, "%s on a stream that is being captured", what);
}

/* Counts a launch that takes this many (invented) microseconds. */
static int launch(void *handle, double us, const char *kind, const char *format, ...) {
  Stream *stream = stream_of(handle);
  if (stream == &legacy && invalidate_where(is_blocking))
    return complain(CAPTURE_IMPLICIT, "%s on the legacy stream during a capture", kind);
  pthread_mutex_lock(&lock);
  stream->end.work[stream->number]++;
  stream->clock_us += us;
  FILE *file = trace();
  if (file) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(file, "%s %s ", capturing(stream) ? "captured" : "run", kind);
    vfprintf(file, format, arguments);
    fputc('\n', file);
    va_end(arguments);
  }
  pthread_mutex_unlock(&lock);
  return OK;
}

int cudaStreamCreateWithPriority(void **out, unsigned flags, int priority) {
  Stream *stream = calloc(1, sizeof *stream);
  stream->priority = priority;
  stream->flags = flags;
  pthread_mutex_lock(&lock);
  stream->next = streams->next;
  streams->next = stream;
  pthread_mutex_unlock(&lock);
  *out = stream;
  return OK;
}
int cudaStreamCreateWithFlags(void **out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
int cudaStreamCreate(void **out) { return cudaStreamCreateWithFlags(out, 0); }
int cudaStreamGetPriority(void *stream, int *priority) {
  *priority = stream_of(stream)->priority;
  return OK;
}
int cudaStreamSynchronize(void *stream) {
  return wait_for(stream_of(stream), "cudaStreamSynchronize");
}
int cudaStreamQuery(void *stream) { return wait_for(stream_of(stream), "cudaStreamQuery"); }
int cudaDeviceSynchronize(void) {
  if (!invalidate_where(is_any)) return OK;
  return complain(CAPTURE_UNSUPPORTED, "cudaDeviceSynchronize during a capture");
}
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
  Stream *where = stream_of(stream);
  if (capturing(where))
    where->end.work[where->number]++;
  else
    function(data);
  return OK;
}
int cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *data,
                          unsigned flags) {
  function(stream, OK, data);
  return OK;
}

/* ---- CUDA graphs: a capture keeps the number of its launches. ---- */

typedef struct {
  int64_t launches;
} Graph;

int cudaThreadExchangeStreamCaptureMode(int *mode) {
  int before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return OK;
}

static Stream *origin_of(unsigned long long capture) {
  for (Stream *one = streams; one; one = one->next)
    if (one->end.capture == capture && one->number == 0) return one;
  return NULL; /* it has ended */
}

int cudaStreamBeginCapture(void *handle, int mode) {
  Stream *stream = stream_of(handle);
  if (stream == &legacy) return complain(CAPTURE_UNSUPPORTED, "a capture of the legacy stream");
  if (capturing(stream)) {
    invalidate(stream->end.capture);
    return complain(ILLEGAL_STATE, "a capture of a stream that is being captured");
  }
  stream->end = (Point){.capture = next_capture++};
  stream->number = stream->invalid = 0;
  stream->mode = mode;
  stream->thread = pthread_self();
  return OK;
}

/* A stream outside of captures waits for a point in one: what follows on it is captured as well. */
static int fork_capture(Stream *stream, const Point *point) {
  int number = 0;
  for (Stream *one = streams; one; one = one->next) number += one->end.capture == point->capture;
  if (number == STREAMS_OF_A_CAPTURE)
    return complain(NOT_SUPPORTED, "more than %d streams in a capture", number);
  stream->end = *point;
  stream->number = number;
  stream->invalid = 0;
  return OK;
}

int cudaStreamEndCapture(void *handle, void **out) {
  Stream *origin = stream_of(handle);
  unsigned long long capture = origin->end.capture;
  *out = NULL;
  if (!capture) return fail(CAPTURE_INVALIDATED);
  if (origin->number) {
    invalidate(capture);
    return complain(CAPTURE_UNMATCHED, "the end of a capture on a stream that it did not begin on");
  }
  if (origin->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(origin->thread, pthread_self()))
    return complain(CAPTURE_WRONG_THREAD, "the end of a capture in another thread than its begin");
  int invalid = 0, unjoined = 0;
  int64_t launches = 0;
  for (Stream *one = streams; one; one = one->next)
    if (one->end.capture == capture) {
      int64_t work = one->end.work[one->number];
      launches += work;
      invalid |= one->invalid;
      unjoined += work > origin->end.work[one->number];
      one->end.capture = 0;
    }
  if (invalid) return fail(CAPTURE_INVALIDATED);
  if (unjoined)
    return complain(CAPTURE_UNJOINED, "the end of a capture, with work of %d streams not joined",
                    unjoined);
  Graph *graph = calloc(1, sizeof *graph);
  graph->launches = launches;
  *out = graph;
  return OK;
}

static int capture_status(Stream *stream) {
  return !capturing(stream) ? 0 : stream->invalid ? 2 : 1; /* none, invalidated, active */
}
int cudaStreamIsCapturing(void *stream, int *status) {
  *status = capture_status(stream_of(stream));
  return OK;
}
int cudaStreamGetCaptureInfo(void *handle, int *status, unsigned long long *id, void **graph,
                             const void **dependencies, const void **edges, size_t *count) {
  Stream *stream = stream_of(handle);
  *status = capture_status(stream);
  if (id) *id = stream->end.capture;
  if (graph) *graph = stream;
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return OK;
}
int cudaGraphInstantiateWithFlags(void **out, void *graph, unsigned long long flags) {
  *out = graph;
  return OK;
}
int cudaGraphLaunch(void *handle, void *stream) {
  Graph *graph = handle;
  return launch(stream, 5.0 * graph->launches, "graph", "%lld launches", (long long)graph->launches);
}
int cudaGraphGetNodes(void *graph, void *nodes, size_t *count) {
  *count = (size_t)((Graph *)graph)->launches;
  return OK;
}
int cudaGraphNodeGetDependencies(void *node, void *dependencies, void *edges, size_t *count) {
  *count = 0;
  return OK;
}

/* ---- Events: where in a capture, or when on the clock of its stream, each was recorded. ---- */

typedef struct {
  double clock_us;
  Point point;
} Event;

int cudaEventCreateWithFlags(void **out, unsigned flags) {
  *out = calloc(1, sizeof(Event));
  return OK;
}
int cudaEventCreate(void **out) { return cudaEventCreateWithFlags(out, 0); }
int cudaEventRecordWithFlags(void *handle, void *stream, unsigned flags) {
  Stream *where = stream_of(stream);
  Event *event = handle;
  event->clock_us = where->clock_us;
  event->point = where->end;
  if (!(flags & cudaEventRecordExternal)) return OK;
  if (!capturing(where)) return complain(INVALID_ARGUMENT, "an external event outside of a capture");
  where->end.work[where->number]++; /* a node of the graph, which orders no streams */
  event->point.capture = 0;
  return OK;
}
int cudaEventRecord(void *event, void *stream) { return cudaEventRecordWithFlags(event, stream, 0); }
static int wait_for_event(const Event *event, const char *what) {
  if (!event->point.capture) return forbidden_in_capture(what);
  invalidate(event->point.capture);
  return complain(CAPTURED_EVENT, "%s on an event of a capture", what);
}
int cudaEventQuery(void *event) { return wait_for_event(event, "cudaEventQuery"); }
int cudaEventSynchronize(void *event) { return wait_for_event(event, "cudaEventSynchronize"); }
int cudaEventElapsedTime(float *ms, void *start, void *end) {
  *ms = (float)((((Event *)end)->clock_us - ((Event *)start)->clock_us) / 1e3);
  return OK;
}

static int wait_in_capture(Stream *stream, const Point *point) {
  unsigned long long capture = stream->end.capture;
  if (stream->invalid) return fail(CAPTURE_INVALIDATED);
  if (point->capture == capture) {
    for (int i = 0; i < STREAMS_OF_A_CAPTURE; i++)
      if (point->work[i] > stream->end.work[i]) stream->end.work[i] = point->work[i];
    return OK;
  }
  invalidate(capture);
  if (!point->capture || !origin_of(point->capture))
    return complain(CAPTURE_ISOLATION, "in a capture, a wait for an event from outside of it");
  invalidate(point->capture);
  return complain(CAPTURE_MERGE, "in a capture, a wait for an event of another one");
}

int cudaStreamWaitEvent(void *handle, void *waited, unsigned flags) {
  Stream *stream = stream_of(handle);
  Event *event = waited;
  if (flags & cudaEventWaitExternal) {
    if (!capturing(stream)) return complain(INVALID_ARGUMENT, "an external wait outside of a capture");
    stream->end.work[stream->number]++;
    return OK;
  }
  if (event->clock_us > stream->clock_us) stream->clock_us = event->clock_us;
  if (capturing(stream)) return wait_in_capture(stream, &event->point);
  if (!event->point.capture) return OK;
  Stream *origin = origin_of(event->point.capture);
  if (!origin || origin->invalid)
    return complain(INVALID_ARGUMENT, "a wait for an event of a capture that has ended or failed");
  if (stream != &legacy) return fork_capture(stream, &event->point);
  invalidate(event->point.capture);
  return complain(CAPTURE_IMPLICIT, "the legacy stream waits for an event of a capture");
}

/* ---- The memory of the card, which processes share. ----

   STAND_IN_MEMORY is an array of how many bytes each process holds. A process locks the byte of the
   file that has the number of its slot. Linux takes the lock away when the process ends, in whatever
   way, and a child does not inherit it: what is in a slot without a lock is free. */

enum { SLOTS = 1024, ALL_SLOTS = SLOTS /* the byte that is locked to read or write the array */ };
static int64_t used;  /* bytes, by this process */
static int64_t *held; /* bytes, by slot; NULL: nothing is shared */
static int memory_file, opened, slot = -1;

/* The type of the lock that is now there or, of F_GETLK, in the way; -1: it failed. */
static int lock_byte(int command, short type, int byte) {
  struct flock range = {.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
  int failed;
  do failed = fcntl(memory_file, command, &range);
  while (failed && errno == EINTR);
  return failed ? -1 : range.l_type;
}

static int in_use(int other) { return lock_byte(F_GETLK, F_WRLCK, other) != F_UNLCK; }

static void open_memory(void) {
  const char *path = getenv("STAND_IN_MEMORY");
  if (opened || !path || !*path) return;
  opened = 1;
  size_t size = SLOTS * sizeof *held;
  memory_file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  void *array = MAP_FAILED;
  if (memory_file >= 0 && !ftruncate(memory_file, size))
    array = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory_file, 0);
  if (array == MAP_FAILED)
    complain(OK, "%s: %s; memory is counted by process", path, strerror(errno));
  else
    held = array;
}

/* Locks the array and returns the bytes that other processes hold. */
static int64_t lock_memory(void) {
  open_memory();
  if (!held) return 0;
  lock_byte(F_SETLKW, F_WRLCK, ALL_SLOTS);
  for (int i = 0; i < SLOTS && slot < 0; i++)
    if (lock_byte(F_SETLK, F_WRLCK, i) >= 0) slot = i;
  assert(slot >= 0);
  held[slot] = used;
  int64_t others = 0;
  for (int i = 0; i < SLOTS; i++)
    if (i != slot && held[i]) {
      if (!in_use(i)) held[i] = 0;
      others += held[i];
    }
  return others;
}

static void unlock_memory(void) {
  if (held) lock_byte(F_SETLK, F_UNLCK, ALL_SLOTS);
}

/* Adds to what this process holds, if there is room. The caller has the `lock` of the threads. */
static int hold(int64_t bytes) {
  int64_t others = lock_memory();
  int room = bytes < 0 || others + used + bytes <= capacity;
  if (room) used += bytes;
  if (held) held[slot] = used;
  unlock_memory();
  return room;
}

typedef struct {
  char *start;
  size_t size;
  int on_host;
} Block;

/* Sorted by address: a launch looks up the block of each of its pointers, and there are hundreds. */
static Block *blocks;
static size_t blocks_used, blocks_room;
enum { COPIED = 1 << 20, READ_BACK_AS_ZERO = 1 << 16 }; /* bytes */

static size_t whole_pages(size_t size) {
  return size ? (size + 4095) & ~(size_t)4095 : 4096;
}

/* How many blocks start at `pointer` or before it. The caller has the lock. */
static size_t blocks_until(const char *pointer) {
  size_t low = 0, high = blocks_used;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (blocks[middle].start <= pointer)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

static void insert(Block block) {
  if (blocks_used == blocks_room) {
    blocks_room = blocks_room ? 2 * blocks_room : 64;
    blocks = realloc(blocks, blocks_room * sizeof *blocks);
    assert(blocks);
  }
  Block *place = blocks + blocks_until(block.start);
  memmove(place + 1, place, (blocks + blocks_used++ - place) * sizeof *blocks);
  *place = block;
}

static int reserve(void **out, size_t size, int on_host) {
  *out = NULL;
  pthread_mutex_lock(&lock);
  int room = on_host || hold(size);
  pthread_mutex_unlock(&lock);
  if (!room) return fail(OUT_OF_MEMORY);
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char *start = mmap(NULL, whole_pages(size), PROT_READ | PROT_WRITE, flags, -1, 0);
  pthread_mutex_lock(&lock);
  if (start == MAP_FAILED) {
    if (!on_host) hold(-(int64_t)size);
    pthread_mutex_unlock(&lock);
    return fail(OUT_OF_MEMORY);
  }
  insert((Block){start, size, on_host});
  pthread_mutex_unlock(&lock);
  *out = start;
  return OK;
}

static int give_back(void *start) {
  pthread_mutex_lock(&lock);
  size_t place = blocks_until(start);
  if (place && blocks[place - 1].start == start) {
    Block block = blocks[place - 1];
    memmove(blocks + place - 1, blocks + place, (blocks_used-- - place) * sizeof *blocks);
    if (!block.on_host) hold(-(int64_t)block.size);
    munmap(block.start, whole_pages(block.size));
  }
  pthread_mutex_unlock(&lock);
  return OK;
}

/* A fork takes another slot when it allocates. What it inherits is counted in its parent's. */
static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork(void) { pthread_mutex_unlock(&lock); }
static void begin_as_fork(void) {
  if (held) munmap(held, SLOTS * sizeof *held);
  if (opened) close(memory_file); /* a fork may close all files, and use their numbers again */
  held = NULL;
  blocks_used = 0;
  opened = used = 0;
  slot = -1;
  after_fork();
}
__attribute__((constructor)) static void follow_forks(void) {
  pthread_atfork(before_fork, after_fork, begin_as_fork);
}

static enum cudaMemoryType memory_type(const void *pointer) {
  enum cudaMemoryType type = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&lock);
  size_t until = blocks_until(pointer);
  if (until) {
    const Block *block = &blocks[until - 1];
    if ((const char *)pointer < block->start + (block->size ? block->size : 1))
      type = block->on_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  }
  pthread_mutex_unlock(&lock);
  return type;
}

int cudaMalloc(void **out, size_t size) {
  int code = forbidden_in_capture("cudaMalloc");
  return code ? code : reserve(out, size, 0);
}
int cudaFree(void *pointer) {
  int code = pointer ? forbidden_in_capture("cudaFree") : OK;
  return code ? code : give_back(pointer);
}
int cudaMallocAsync(void **out, size_t size, void *stream) { return reserve(out, size, 0); }
int cudaFreeAsync(void *pointer, void *stream) { return give_back(pointer); }
int cudaHostAlloc(void **out, size_t size, unsigned flags) { return reserve(out, size, 1); }
int cudaFreeHost(void *pointer) { return give_back(pointer); }
int cudaMemGetInfo(size_t *available, size_t *total) {
  pthread_mutex_lock(&lock);
  *total = capacity;
  *available = capacity - used - lock_memory();
  unlock_memory();
  pthread_mutex_unlock(&lock);
  return OK;
}
int cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *pointer) {
  memset(out, 0, sizeof *out);
  out->type = memory_type(pointer);
  out->devicePointer = (void *)pointer;
  out->hostPointer = out->type == cudaMemoryTypeDevice ? NULL : (void *)pointer;
  return OK;
}

static void copy(void *to, const void *from, size_t size) {
  int from_device = memory_type(from) == cudaMemoryTypeDevice;
  int to_device = memory_type(to) == cudaMemoryTypeDevice;
  if (from_device && to_device) return;
  if (from_device && size <= READ_BACK_AS_ZERO)
    memset(to, size == 1, size); /* a boolean is true, any other small value zero */
  else if (size <= COPIED)
    memcpy(to, from, size);
  else if (!to_device)
    memset(to, 0, size);
}

static double copy_us(size_t size) { return 1 + size / 3e6; }

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  int code = launch(stream, copy_us(size), "memcpy", "%zu bytes, kind %d", size, kind);
  if (!code) copy(to, from, size);
  return code;
}
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  int code = forbidden_in_capture("cudaMemcpy");
  if (!code) copy(to, from, size);
  return code;
}
int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                      size_t height, int kind, void *stream) {
  return launch(stream, copy_us(width * height), "memcpy2d", "%zu bytes", width * height);
}
int cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size,
                        void *stream) {
  return launch(stream, copy_us(size), "memcpypeer", "%zu bytes", size);
}
int cudaMemset(void *pointer, int value, size_t size) {
  if (size <= COPIED) memset(pointer, value, size);
  return OK;
}
int cudaMemsetAsync(void *pointer, int value, size_t size, void *stream) {
  int code = launch(stream, copy_us(size), "memset", "%zu bytes", size);
  return code ? code : cudaMemset(pointer, value, size);
}
int cudaGetSymbolAddress(void **out, const void *symbol) {
  static char storage[1 << 20];
  *out = storage;
  return OK;
}

/* ---- The device. ---- */

static const struct {
  int attribute, value; /* cudaDeviceAttr, what is not listed is 0 */
} attributes[] = {
    {1, THREADS_OF_A_BLOCK},         /* threads of a block */
    {2, 1024},                       /* block x, y, z */
    {3, 1024},
    {4, 64},
    {5, 2147483647},                 /* grid x, y, z */
    {6, GRID_YZ},
    {7, GRID_YZ},
    {8, 49152},                      /* shared memory of a block, without opting in */
    {9, 65536},                      /* constant memory */
    {10, 32},                        /* warp */
    {11, 2147483647},                /* pitch */
    {12, 65536},                     /* registers of a block */
    {13, 1980000},                   /* clock, kHz */
    {14, 512},                       /* texture alignment */
    {15, 1},                         /* copies and kernels overlap */
    {16, MULTIPROCESSORS},
    {31, 1},                         /* concurrent kernels */
    {36, 2619000},                   /* memory clock, kHz */
    {37, 5120},                      /* memory bus, bits */
    {38, L2_BYTES},
    {39, 2048},                      /* threads of a multiprocessor */
    {40, 3},                         /* copy engines */
    {41, 1},                         /* unified addresses */
    {75, 9},                         /* compute capability */
    {76, 0},
    {78, 1},                         /* stream priorities */
    {79, 1},                         /* caches of globals and locals in L1 */
    {80, 1},
    {81, 233472},                    /* shared memory of a multiprocessor */
    {82, 65536},                     /* registers of a multiprocessor */
    {83, 1},                         /* managed memory */
    {89, 1},                         /* concurrent managed access */
    {90, 1},                         /* compute preemption */
    {95, 1},                         /* cooperative launch */
    {97, SHARED_MEMORY_OF_A_BLOCK},
    {106, 32},                       /* blocks of a multiprocessor */
    {111, 1024},                     /* shared memory that the system takes of a block */
    {115, 1},                        /* memory pools */
    {120, 1},                        /* clusters */
};

int cudaDeviceGetAttribute(int *out, int attribute, int device) {
  *out = 0;
  for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
    if (attributes[i].attribute == attribute) *out = attributes[i].value;
  return OK;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
  memset(out, 0, sizeof *out);
  const char *name = getenv("STAND_IN_NAME");
  snprintf(out->name, sizeof out->name, "%s", name ? name : "stand-in for an NVIDIA H100");
  memset(&out->uuid, 0x42, sizeof out->uuid);
  out->totalGlobalMem = capacity;
  out->major = 9;
  out->multiProcessorCount = MULTIPROCESSORS;
  out->l2CacheSize = L2_BYTES;
  out->sharedMemPerBlock = 49152;
  out->sharedMemPerBlockOptin = SHARED_MEMORY_OF_A_BLOCK;
  out->sharedMemPerMultiprocessor = 233472;
  out->reservedSharedMemPerBlock = 1024;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->warpSize = 32;
  out->maxThreadsPerBlock = THREADS_OF_A_BLOCK;
  out->maxThreadsPerMultiProcessor = 2048;
  out->maxBlocksPerMultiProcessor = 32;
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 2147483647;
  out->maxGridSize[1] = out->maxGridSize[2] = GRID_YZ;
  out->totalConstMem = 65536;
  out->memPitch = 2147483647;
  out->memoryBusWidth = 5120;
  out->textureAlignment = 512;
  out->texturePitchAlignment = 32;
  out->asyncEngineCount = 3;
  out->canMapHostMemory = out->concurrentKernels = out->ECCEnabled = out->unifiedAddressing = 1;
  out->managedMemory = out->concurrentManagedAccess = out->computePreemptionSupported = 1;
  out->streamPrioritiesSupported = out->cooperativeLaunch = out->clusterLaunch = 1;
  out->globalL1CacheSupported = out->localL1CacheSupported = out->memoryPoolsSupported = 1;
  return OK;
}

int cudaGetDeviceCount(int *count) {
  *count = 1;
  return OK;
}
int cudaGetDevice(int *device) {
  *device = 0;
  return OK;
}
int cudaSetDevice(int device) { return device ? fail(INVALID_DEVICE) : OK; }
int cudaDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return OK;
}
int cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return OK;
}
int cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = 0;
  return OK;
}
int cudaDeviceGetPCIBusId(char *out, int length, int device) {
  snprintf(out, length, "0000:00:00.0");
  return OK;
}
int cudaDeviceGetDefaultMemPool(void **pool, int device) {
  *pool = (void *)16;
  return OK;
}
int cudaMemPoolGetAttribute(void *pool, int attribute, void *value) {
  *(uint64_t *)value = 0;
  return OK;
}
int cudaIpcGetMemHandle(void *handle, void *pointer) { return fail(NOT_SUPPORTED); }
int cudaIpcGetEventHandle(void *handle, void *event) { return fail(NOT_SUPPORTED); }

int cudaGetLastError(void) {
  int code = last_error;
  last_error = OK;
  return code;
}
int cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(int code) {
  switch (code) {
  case OK: return "no error";
  case INVALID_ARGUMENT: return "invalid argument";
  case OUT_OF_MEMORY: return "out of memory";
  case INVALID_LAUNCH: return "invalid configuration argument";
  case INVALID_DEVICE: return "invalid device ordinal";
  case CAPTURE_UNSUPPORTED: return "operation not permitted when stream is capturing";
  case CAPTURE_INVALIDATED: return "operation failed due to a previous error during capture";
  case CAPTURE_MERGE: return "operation would result in a merge of separate capture sequences";
  case CAPTURE_UNMATCHED: return "capture was not ended in the same stream as it began";
  case CAPTURE_UNJOINED: return "capturing stream has unjoined work";
  case CAPTURE_ISOLATION: return "dependency created on uncaptured work in another stream";
  case CAPTURE_IMPLICIT:
    return "operation would make the legacy stream depend on a capturing blocking stream";
  case CAPTURED_EVENT: return "operation not permitted on an event last recorded in a capturing stream";
  case CAPTURE_WRONG_THREAD:
    return "attempt to terminate a thread-local capture sequence from another thread";
  default: return "error of the stand-in CUDA driver";
  }
}
const char *cudaGetErrorName(int code) {
  return code == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaErrorStandIn";
}

int cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version,
                                     unsigned long long flags, int *status) {
  *out = dlsym(RTLD_DEFAULT, name);
  if (!*out) *out = (void *)stand_in_ok;
  if (status) *status = OK;
  return OK;
}

/* ---- Kernels that nvcc compiled into PyTorch: by the address of their host function. ---- */

typedef struct {
  const void *host;
  const char *name;
} Kernel;

enum { KERNEL_SLOTS = 1 << 19 }; /* PyTorch registers about 100,000 */
static Kernel *kernels;          /* a hash table with linear probing */

static Kernel *kernel_slot(const void *host) {
  uint64_t hash = (uintptr_t)host;
  hash = (hash ^ hash >> 17) * 0x9E3779B97F4A7C15ull;
  size_t slot = hash & (KERNEL_SLOTS - 1);
  while (kernels[slot].host && kernels[slot].host != host) slot = (slot + 1) & (KERNEL_SLOTS - 1);
  return &kernels[slot];
}
static const char *kernel_name(const void *host) {
  const char *name = kernels ? kernel_slot(host)->name : NULL;
  return name ? name : "unknown";
}

void **__cudaRegisterFatBinary(void *binary) { return calloc(1, 16); }
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name,
                            int limit, void *a, void *b, void *c, void *d, int *size) {
  static int count;
  if (!kernels) kernels = calloc(KERNEL_SLOTS, sizeof *kernels);
  if (count++ < KERNEL_SLOTS / 2) *kernel_slot(host) = (Kernel){host, name};
}
char __cudaInitModule(void **handle) { return 1; }

typedef struct {
  unsigned x, y, z;
} Dim3;
static __thread struct {
  Dim3 grid, block;
  size_t shared;
  void *stream;
} pushed[16];
static __thread int depth;

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void *stream) {
  if (depth < 16) {
    pushed[depth].grid = grid;
    pushed[depth].block = block;
    pushed[depth].shared = shared;
    pushed[depth].stream = stream;
  }
  depth++;
  return OK;
}
int __cudaPopCallConfiguration(Dim3 *grid, Dim3 *block, size_t *shared, void *stream) {
  depth--;
  if (depth < 16) {
    *grid = pushed[depth].grid;
    *block = pushed[depth].block;
    *shared = pushed[depth].shared;
    *(void **)stream = pushed[depth].stream;
  }
  return OK;
}
int __cudaGetKernel(void **out, const void *host) {
  *out = (void *)host;
  return OK;
}

static int launch_kernel(const char *name, Dim3 grid, Dim3 block, size_t shared, void *stream) {
  uint64_t threads = (uint64_t)block.x * block.y * block.z;
  int empty = !grid.x || !grid.y || !grid.z || !threads;
  int large = grid.y > GRID_YZ || grid.z > GRID_YZ || threads > THREADS_OF_A_BLOCK;
  if (empty || large || shared > SHARED_MEMORY_OF_A_BLOCK)
    return complain(INVALID_LAUNCH, "%s: grid %u %u %u, block %u %u %u, %zu bytes of shared memory",
                    name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
  return launch(stream, 5.0, "kernel", "%u %u %u  %u %u %u  %zu  %.1200s", grid.x, grid.y, grid.z,
                block.x, block.y, block.z, shared, name);
}
int cudaLaunchKernel(const void *kernel, Dim3 grid, Dim3 block, void **arguments, size_t shared,
                     void *stream) {
  return launch_kernel(kernel_name(kernel), grid, block, shared, stream);
}
int __cudaLaunchKernel(const void *kernel, Dim3 grid, Dim3 block, void **arguments, size_t shared,
                       void *stream) {
  return launch_kernel(kernel_name(kernel), grid, block, shared, stream);
}
int cudaLaunchCooperativeKernel(const void *kernel, Dim3 grid, Dim3 block, void **arguments,
                                size_t shared, void *stream) {
  return launch_kernel(kernel_name(kernel), grid, block, shared, stream);
}
int cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
  Dim3 grid = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  Dim3 block = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  return launch_kernel(kernel_name(kernel), grid, block, config->dynamicSmemBytes, config->stream);
}
int cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *kernel) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = THREADS_OF_A_BLOCK;
  out->numRegs = 32;
  out->ptxVersion = out->binaryVersion = 90;
  out->maxDynamicSharedSizeBytes = 49152;
  return OK;
}

static int set_shared_memory(int attribute, int value) {
  return attribute == 8 && value > SHARED_MEMORY_OF_A_BLOCK ? fail(INVALID_ARGUMENT) : OK;
}
int cudaFuncSetAttribute(const void *kernel, int attribute, int value) {
  return set_shared_memory(attribute, value);
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads,
                                                  size_t shared) {
  *blocks = 2;
  return OK;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel,
                                                           int threads, size_t shared,
                                                           unsigned flags) {
  *blocks = 2;
  return OK;
}

/* ---- The driver, by which Triton and Inductor load and launch what they compiled. ---- */

typedef struct {
  char name[1024];
} Function;
typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void *stream, *attributes;
  unsigned count;
} LaunchConfig;

int cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cuCtxGetCurrent(void **context) {
  *context = (void *)8;
  return OK;
}
int cuCtxGetDevice(int *device) { return cudaGetDevice(device); }
int cuCtxGetLimit(size_t *value, int limit) {
  *value = 1 << 20;
  return OK;
}
int cuDeviceGet(int *device, int index) { return cudaGetDevice(device); }
int cuDeviceGetCount(int *count) { return cudaGetDeviceCount(count); }
int cuDeviceGetAttribute(int *out, int attribute, int device) {
  return cudaDeviceGetAttribute(out, attribute, device);
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return OK;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return cuCtxGetCurrent(context); }
int cuGetErrorString(int code, const char **text) {
  *text = cudaGetErrorString(code);
  return OK;
}
int cuModuleLoadData(void **module, const void *image) {
  int before = last_error, code = forbidden_in_capture("cuModuleLoadData");
  last_error = before; /* it is the runtime's: errors of the driver do not show there */
  *module = (void *)16;
  return code;
}
int cuModuleLoadDataEx(void **module, const void *image, unsigned count, void *options,
                       void *values) {
  return cuModuleLoadData(module, image);
}
int cuModuleLoad(void **module, const char *path) { return cuModuleLoadData(module, path); }
int cuModuleGetFunction(void **out, void *module, const char *name) {
  Function *function = calloc(1, sizeof *function);
  snprintf(function->name, sizeof function->name, "%s", name);
  *out = function;
  return OK;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? THREADS_OF_A_BLOCK : attribute == 4 ? 32 : 0; /* 4: registers */
  return OK;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  int before = last_error, code = set_shared_memory(attribute, value);
  last_error = before;
  return code;
}
int cuPointerGetAttribute(void *out, int attribute, unsigned long long pointer) {
  if (pointer && memory_type((void *)pointer) == cudaMemoryTypeUnregistered)
    return INVALID_ARGUMENT; /* Triton then says that a CPU tensor cannot be accessed */
  *(unsigned long long *)out = pointer;
  return OK;
}
int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                   void *stream, void **arguments, void **extra) {
  Dim3 grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
  int before = last_error;
  int code = launch_kernel(((Function *)function)->name, grid, block, shared, stream);
  last_error = before;
  return code;
}
int cuLaunchKernelEx(const LaunchConfig *config, void *function, void **arguments, void **extra) {
  return cuLaunchKernel(function, config->grid_x, config->grid_y, config->grid_z, config->block_x,
                        config->block_y, config->block_z, config->shared, config->stream, arguments,
                        extra);
}
int cuLaunchCooperativeKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                              unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                              void *stream, void **arguments) {
  return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream,
                        arguments, NULL);
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads,
                                                size_t shared) {
  *blocks = 2;
  return OK;
}
int cuOccupancyMaxActiveClusters(int *clusters, void *function, void *config) {
  *clusters = 1;
  return OK;
}
// Private tables of the driver, for a CUDA runtime inside another library, as DALI's: it reports
// the error.
int cuGetExportTable(const void **table, const void *id) {
    *table = NULL;
    return 500; // CUDA_ERROR_NOT_FOUND
}

int cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *status) {
  return cudaGetDriverEntryPointByVersion(name, out, version, flags, status);
}
int cuGetProcAddress(const char *name, void **out, int version, uint64_t flags, int *status) {
  return cudaGetDriverEntryPointByVersion(name, out, version, flags, status);
}

/* ---- cuBLAS, cuSOLVER, cuDNN. A handle is a block whose first word is the stream. ---- */

static int create(void **out) {
  *out = calloc(1, 64);
  return OK;
}
static int set_stream(void *handle, void *stream) {
  *(void **)handle = stream;
  return OK;
}
static void *stream_of_handle(void *handle) { return handle ? *(void **)handle : NULL; }

int cublasCreate_v2(void **handle) { return create(handle); }
int cublasSetStream_v2(void *handle, void *stream) { return set_stream(handle, stream); }
int cublasGetMathMode(void *handle, int *mode) {
  *mode = 0;
  return OK;
}
int cublasGetPointerMode_v2(void *handle, int *mode) {
  *mode = 0;
  return OK;
}
size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }

static int product(void *stream, const char *name, uint64_t m, uint64_t n, uint64_t k) {
  double us = 3 + 2.0 * m * n * k / 600e6; /* at 600 TFLOP/s */
  return launch(stream, us, "gemm", "%s m %llu n %llu k %llu", name, (unsigned long long)m,
                (unsigned long long)n, (unsigned long long)k);
}
#define PRODUCT(function)                                                                          \
  int cublas##function(void *handle, int transpose_a, int transpose_b, int m, int n, int k) {      \
    return product(stream_of_handle(handle), #function, m, n, k);                                  \
  }
PRODUCT(GemmEx)
PRODUCT(Sgemm_v2)
PRODUCT(Dgemm_v2)
PRODUCT(GemmStridedBatchedEx)
PRODUCT(SgemmStridedBatched)
PRODUCT(DgemmStridedBatched)

typedef struct {
  uint64_t rows, columns;
} Layout;

int cublasLtMatrixLayoutCreate(void **out, int type, uint64_t rows, uint64_t columns,
                               int64_t stride) {
  Layout *layout = calloc(1, sizeof *layout);
  *layout = (Layout){rows, columns};
  *out = layout;
  return OK;
}
int cublasLtMatrixLayoutDestroy(void *layout) {
  free(layout);
  return OK;
}
int cublasLtMatmulDescCreate(void **out, int compute, int scale) { return create(out); }
int cublasLtMatmulDescDestroy(void *description) {
  free(description);
  return OK;
}
int cublasLtMatmulPreferenceCreate(void **out) { return create(out); }
int cublasLtMatmulPreferenceDestroy(void *preference) {
  free(preference);
  return OK;
}
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b, void *c,
                                   void *d, void *preference, int wanted, void *results,
                                   int *count) {
  enum { HEURISTIC_RESULT_BYTES = 64 + 8 + 4 + 4 + 16 }; /* cublasLtMatmulHeuristicResult_t */
  memset(results, 0, HEURISTIC_RESULT_BYTES);
  *count = 1;
  return OK;
}
int cublasLtMatmul(void *handle, void *description, const void *alpha, const void *A, void *a,
                   const void *B, void *b, const void *beta, const void *C, void *c, void *D,
                   void *d, const void *algorithm, void *workspace, size_t size, void *stream) {
  Layout *left = a, *out = d;
  uint64_t inner = left->rows == out->rows ? left->columns : left->rows;
  return product(stream, "LtMatmul", out->rows, out->columns, inner);
}

int cusolverDnCreate(void **handle) { return create(handle); }
int cusolverDnSetStream(void *handle, void *stream) { return set_stream(handle, stream); }
int cusolverDnCreateParams(void **parameters) { return create(parameters); }
int cusolverDnXgeqrf_bufferSize(void *handle, void *parameters, int64_t m, int64_t n, int type_a,
                                const void *a, int64_t lda, int type_tau, const void *tau, int type,
                                size_t *on_device, size_t *on_host) {
  *on_device = 1 << 20;
  *on_host = 0;
  return OK;
}
#define FACTORISE(function)                                                                        \
  int cusolverDn##function(void *handle) {                                                         \
    return launch(stream_of_handle(handle), 300, "solver", #function);                             \
  }
#define GEQRF_SIZE(function)                                                                       \
  int cusolverDn##function##_bufferSize(void *handle, int m, int n, void *a, int lda, int *size) { \
    *size = 1 << 18;                                                                               \
    return OK;                                                                                     \
  }
#define ORGQR_SIZE(function)                                                                       \
  int cusolverDn##function##_bufferSize(void *handle, int m, int n, int k, void *a, int lda,       \
                                        void *tau, int *size) {                                    \
    *size = 1 << 18;                                                                               \
    return OK;                                                                                     \
  }
FACTORISE(Xgeqrf)
FACTORISE(Sgeqrf)
FACTORISE(Dgeqrf)
FACTORISE(Sorgqr)
FACTORISE(Dorgqr)
GEQRF_SIZE(Sgeqrf)
GEQRF_SIZE(Dgeqrf)
ORGQR_SIZE(Sorgqr)
ORGQR_SIZE(Dorgqr)

/* Of cuDNN the convolutions, by the interface of version 7, and the sizes that batch norm asks for. */
typedef struct {
  int algorithm, status;
  float time;
  size_t memory;
  int determinism, math, reserved[3];
} Performance;

int cudnnCreate(void **handle) { return create(handle); }
int cudnnSetStream(void *handle, void *stream) { return set_stream(handle, stream); }
int cudnnGetStream(void *handle, void **stream) {
  *stream = stream_of_handle(handle);
  return OK;
}
int cudnnCreateTensorDescriptor(void **out) { return create(out); }
int cudnnCreateFilterDescriptor(void **out) { return create(out); }
int cudnnCreateConvolutionDescriptor(void **out) { return create(out); }
int cudnnCreateActivationDescriptor(void **out) { return create(out); }
int cudnnCreateDropoutDescriptor(void **out) { return create(out); }
int cudnnCreatePoolingDescriptor(void **out) { return create(out); }

#define CONVOLUTION(step)                                                                          \
  int cudnnGetConvolution##step##Algorithm_v7(void *handle, void *a, void *b, void *c, void *d,    \
                                              int wanted, int *count, Performance *out) {          \
    *out = (Performance){.algorithm = 1, .determinism = 1, .math = 1};                             \
    *count = 1;                                                                                    \
    return OK;                                                                                     \
  }                                                                                                \
  int cudnnFindConvolution##step##AlgorithmEx(void *handle, void *ad, void *a, void *bd, void *b,  \
                                              void *cd, void *dd, void *d, int wanted, int *count, \
                                              Performance *out) {                                  \
    return cudnnGetConvolution##step##Algorithm_v7(handle, ad, bd, cd, dd, wanted, count, out);    \
  }                                                                                                \
  int cudnnGetConvolution##step##WorkspaceSize(void *handle, void *a, void *b, void *c, void *d,   \
                                               int algorithm, size_t *size) {                      \
    *size = 1 << 20;                                                                               \
    return OK;                                                                                     \
  }                                                                                                \
  int cudnnConvolution##step(void *handle) {                                                       \
    return launch(stream_of_handle(handle), 100, "cudnn", "Convolution" #step);                    \
  }
CONVOLUTION(Forward)
CONVOLUTION(BackwardData)
CONVOLUTION(BackwardFilter)
int cudnnConvolutionBiasActivationForward(void *handle) {
  return launch(stream_of_handle(handle), 100, "cudnn", "ConvolutionBiasActivationForward");
}
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void *handle, int mode, int operations,
                                                             void *x, void *z, void *y,
                                                             void *scale, void *activation,
                                                             size_t *size) {
  *size = 1 << 20;
  return OK;
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void *handle, int mode, int operations,
                                                      void *x, void *y, void *dy, void *dz,
                                                      void *dx, void *dscale, void *activation,
                                                      size_t *size) {
  *size = 1 << 20;
  return OK;
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *handle, int mode, int operations,
                                                         void *activation, void *x, size_t *size) {
  *size = 1 << 20;
  return OK;
}
int cudnnBackendCreateDescriptor(int kind, void **out) { return CUDNN_NOT_SUPPORTED; }

/* The profiler sees operators of the host and no kernels. */
int cuptiGetVersion(unsigned *version) {
  *version = CUPTI_VERSION;
  return OK;
}
int cuptiGetResultString(int code, const char **text) {
  *text = "error of the stand-in CUDA driver";
  return OK;
}
int cuptiActivityGetNumDroppedRecords(void *context, unsigned stream, size_t *count) {
  *count = 0;
  return OK;
}
int cuptiActivityGetNextRecord(void *buffer, size_t size, void **record) {
  return CUPTI_MAX_LIMIT_REACHED;
}
