// What torch's C++ asks of CUDA although nothing is computed there: devices, streams and pinned memory. It makes a build of
// torch without CUDA accept tensors of cuda:0, see standin.py.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <map>
#include <mutex>

namespace {
using namespace c10;

struct StandinGuard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Stream stream() { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
static impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, new StandinGuard());

// "Pinned" memory is ordinary memory whose ranges are remembered, so that is_pinned() is right.
struct PinnedAllocator final : Allocator {
  static std::map<const char*, size_t>& ranges() { static std::map<const char*, size_t> all; return all; }
  static std::mutex& guard() { static std::mutex one; return one; }
  static void release(void* data) {
    { std::lock_guard<std::mutex> lock(guard()); ranges().erase(static_cast<char*>(data)); }
    free(data);
  }
  DataPtr allocate(size_t bytes) override {
    void* data = bytes ? aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    if (data) { std::lock_guard<std::mutex> lock(guard()); ranges()[static_cast<char*>(data)] = bytes; }
    return {data, data, &release, Device(DeviceType::CPU)};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  static bool contains(const void* data) {
    std::lock_guard<std::mutex> lock(guard());
    auto after = ranges().upper_bound(static_cast<const char*>(data));
    if (after == ranges().begin()) return false;
    --after;
    return static_cast<const char*>(data) < after->first + after->second;
  }
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void deviceSynchronize(DeviceIndex) const override {}
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::contains(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { static PinnedAllocator one; return &one; }
};
}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)  // torch looks it up by this name
}
