# The CUDA emulator: objects in $(B)/cuda_emu (fast), cuda_emu_check (races, bounds, alignment, uninitialised reads) and
# cuda_emu_asan. Kernels and host code under test are compiled with
#   $(EMU_CXX) -x c++ $(EMU_FLAGS) $(EMU_KERNEL_<kind>) -c x.cu
# and linked with $(EMU_OBJ_<kind>) $(EMU_LINK_<kind>) into a program or a shared object. <kind>: fast check asan.
CUDA_HOME ?= /usr/local/cuda
EMU_CXX ?= g++
EMU_DIR := tests/cuda_emu
EMU_KINDS := fast check asan
EMU_FOLDER_fast := $(B)/cuda_emu
EMU_FOLDER_check := $(B)/cuda_emu_check
EMU_FOLDER_asan := $(B)/cuda_emu_asan

EMU_FLAGS := -std=c++17 -O2 -g -fPIC -fvisibility=hidden -ffp-contract=off -fno-omit-frame-pointer -pthread -Wall -Wextra -DQVL_CUDA_EMU \
	-isystem $(CUDA_HOME)/include -I$(EMU_DIR)
EMU_KERNEL_fast :=
EMU_KERNEL_check := -fsanitize=thread,alignment -fsanitize-undefined-trap-on-error
EMU_KERNEL_asan := -fsanitize=address,undefined -fno-sanitize-recover=all
EMU_OWN_fast := -O3 -Wshadow
EMU_OWN_check := -O3 -Wshadow -DQVL_EMU_CHECK
EMU_OWN_asan := -O2 -Wshadow -fsanitize=address
EMU_LINK_fast := -pthread
EMU_LINK_check := -pthread
EMU_LINK_asan := -pthread -fsanitize=address,undefined

EMU_PARTS := core memory rt blaslt nccl
EMU_TEST_PARTS := emu kernels host
EMU_PARTS_fast := $(EMU_PARTS)
EMU_PARTS_check := $(EMU_PARTS) check
EMU_PARTS_asan := $(EMU_PARTS)
$(foreach k,$(EMU_KINDS),$(eval EMU_OBJ_$k := $(EMU_PARTS_$k:%=$(EMU_FOLDER_$k)/emu_%.o)))

.PHONY: emu-headers check-emu-self
emu-headers:
	@for h in cuda_runtime.h cuda_bf16.h crt/host_defines.h cublasLt.h nccl.h; do [ -e $(CUDA_HOME)/include/$$h ] || { \
		echo "The CUDA emulator needs the CUDA toolkit's headers (no GPU, no driver); $(CUDA_HOME)/include/$$h is missing."; \
		echo "Install cuda-cudart-dev, cuda-crt, libcublas-dev and libnccl-dev from NVIDIA's Debian repository, or"; \
		echo "pip download nvidia-cuda-runtime nvidia-cuda-crt nvidia-cublas nvidia-nccl-cu13 and unpack them; then CUDA_HOME=folder."; exit 1; }; done

define emu_kind
$(EMU_FOLDER_$1)/emu_%.o: $(EMU_DIR)/emu_%.cpp | emu-headers
	@mkdir -p $$(@D)
	$$(SAY) CXX "$$< ($1)"
	$$(Q)$$(EMU_CXX) $$(EMU_FLAGS) $$(EMU_OWN_$1) -MMD -MP -c $$< -o $$@
$(EMU_FOLDER_$1)/test_%.o: $(EMU_DIR)/test_%.cpp | emu-headers
	@mkdir -p $$(@D)
	$$(SAY) CXX "$$< ($1)"
	$$(Q)$$(EMU_CXX) $$(EMU_FLAGS) $$(EMU_KERNEL_$1) -DEMU_KIND='"$1"' -MMD -MP -c $$< -o $$@
$(EMU_FOLDER_$1)/test_emu: $(EMU_TEST_PARTS:%=$(EMU_FOLDER_$1)/test_%.o) $(EMU_OBJ_$1)
	$$(SAY) LD $$@
	$$(Q)$$(EMU_CXX) -o $$@ $$^ $$(EMU_LINK_$1)
endef
$(foreach k,$(EMU_KINDS),$(eval $(call emu_kind,$k)))

EMU_TESTS := $(foreach k,$(EMU_KINDS),$(EMU_FOLDER_$k)/test_emu)
check-emu-self: $(EMU_TESTS) ## the CUDA emulator against itself: planted faults in kernels and host code, three builds
	@for k in $(EMU_KINDS); do case $$k in $(foreach k,$(EMU_KINDS),$k$(close) t=$(EMU_FOLDER_$k)/test_emu;;) esac; $$t $$t.table || exit 1; done
	@$(EMU_DIR)/table.sh $(EMU_TESTS:%=%.table)
