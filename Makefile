# libqvl and its tools. "make help" lists the targets. Everything is built below build/$(CONFIG).
MAKEFLAGS += --no-builtin-rules
CONFIG ?= release
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
DESTDIR ?=
PORT ?= 8080
B := build/$(CONFIG)

VERSION := $(shell sed -n 's/^\#define QVL_VERSION "\(.*\)"/\1/p' include/qvl.h)
SOVERSION := 0

PKGS := libjpeg libpng libwebp jansson libpcre2-8 libutf8proc

close := )
# V=1 shows the commands.
Q := $(if $(V),,@)
SAY = @printf '  %-3s %s\n'

CC ?= cc
WARN := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith -Wvla
CFLAGS ?= -O2 -g
CPPFLAGS_ALL = -D_GNU_SOURCE $(CPPFLAGS) $(PKG_CFLAGS)
# -ffp-contract=off: where a multiply and an add become one instruction is written in simd.h, never left to the compiler.
CFLAGS_ALL = -std=c11 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -pthread $(WARN) $(CFLAGS) $(SAN)
LDLIBS_ALL = $(PKG_LIBS) -lm -pthread -ldl

ifeq ($(CONFIG),asan)
SAN := -fsanitize=address -fno-omit-frame-pointer -O1
endif
ifeq ($(CONFIG),ubsan)
SAN := -fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all -O1
endif
ifeq ($(CONFIG),fuzz)
SAN := -fsanitize=address,fuzzer-no-link -O1
endif
ifeq ($(CONFIG),tsan)
SAN := -fsanitize=thread -O1
endif

ifeq ($(filter deps help clean,$(MAKECMDGOALS)),)
PKG_CFLAGS := $(shell pkg-config --cflags $(PKGS) 2>/dev/null)
PKG_LIBS := $(shell pkg-config --libs $(PKGS) 2>/dev/null)
endif

LIB_SRC := $(filter-out %/kern.c,$(wildcard libqvl/*/*.c libqvl/*/*/*.c))
LIB_OBJ := $(LIB_SRC:%.c=$(B)/%.o)
LIB_SO := $(B)/libqvl.so.$(VERSION)
LIB_A := $(B)/libqvl.a

# The kernels: one source over simd.h, compiled once for each instruction set with its own flags.
KERN_SRC := libqvl/device/cpu/kern.c
ISA_generic :=
ISA_avx2 := -mavx2 -mfma -mf16c
ISA_avx2_vnni := $(ISA_avx2) -mavxvnni
ISA_avx512 := -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c
ISA_avx512_vnni := $(ISA_avx512) -mavx512vnni
ISA_avx512_bf16 := $(ISA_avx512_vnni) -mavx512bf16
ISA_amx := $(ISA_avx512_bf16)
ifeq ($(shell uname -m),x86_64)
ISAS := generic avx2 avx2_vnni avx512 avx512_vnni avx512_bf16 amx
else
ISAS := generic
endif
KERN_OBJ := $(ISAS:%=$(B)/libqvl/device/cpu/kern_%.o)

.PHONY: all
all: $(B)/libqvl.so $(LIB_A) $(B)/qvl $(B)/qvl-serve ## library, command-line tool and server

$(B)/%.o: %.c
	@mkdir -p $(@D)
	$(SAY) CC $<
	$(Q)$(CC) $(CPPFLAGS_ALL) $(CFLAGS_ALL) -MMD -MP -c $< -o $@

$(B)/libqvl/device/cpu/kern_%.o: $(KERN_SRC)
	@mkdir -p $(@D)
	$(SAY) CC "$< ($*)"
	$(Q)$(CC) $(CPPFLAGS_ALL) $(CFLAGS_ALL) -O3 $(ISA_$*) -DQVL__ISA_$* -MMD -MP -c $< -o $@

$(LIB_A): $(LIB_OBJ) $(KERN_OBJ)
	$(SAY) AR $@
	@rm -f $@
	$(Q)$(AR) rcs $@ $^

$(LIB_SO): $(LIB_OBJ) $(KERN_OBJ) libqvl/api/libqvl.map
	$(SAY) LD $@
	$(Q)$(CC) -shared $(SAN) -Wl,-soname,libqvl.so.$(SOVERSION) -Wl,--version-script,libqvl/api/libqvl.map -Wl,--no-undefined \
		-o $@ $(LIB_OBJ) $(KERN_OBJ) $(LDFLAGS) $(LDLIBS_ALL)

$(B)/libqvl.so: $(LIB_SO)
	@ln -sf $(notdir $(LIB_SO)) $(B)/libqvl.so.$(SOVERSION)
	@ln -sf $(notdir $(LIB_SO)) $@

# The command-line tool and the examples: programs over qvl.h, linked statically so that they run from anywhere.
TOOL_OBJ := $(patsubst %.c,$(B)/%.o,$(wildcard examples/qvl/*.c))
$(TOOL_OBJ): CPPFLAGS += -Iinclude -DQVL_DATADIR='"$(PREFIX)/share/qvl"'
$(B)/qvl: $(TOOL_OBJ) $(LIB_A)
	$(SAY) LD $@
	$(Q)$(CC) $(SAN) -o $@ $^ $(LDFLAGS) $(LDLIBS_ALL)

EXAMPLE_BIN := $(patsubst %.c,$(B)/%,$(wildcard examples/*.c))
$(B)/examples/%: examples/%.c include/qvl.h $(LIB_A)
	@mkdir -p $(@D)
	$(SAY) CC $<
	$(Q)$(CC) -Iinclude $(CFLAGS_ALL) -o $@ $< $(LIB_A) $(LDFLAGS) $(LDLIBS_ALL)

.PHONY: examples
examples: $(EXAMPLE_BIN) ## caption, chat and batch: small programs over qvl.h

# The CUDA plug-in. Nothing else needs the toolkit: libqvl finds libqvl-cuda.so when it opens a GPU. SASS for the GPUs
# that are in use, PTX of the last for those to come. --fmad=false: fused multiply-adds are written where they are meant.
CUDA_HOME ?= /usr/local/cuda
NVCC ?= $(CUDA_HOME)/bin/nvcc
CUDA_ARCHS ?= 80 86 89 90 100 120
CUDA_SRC := $(wildcard libqvl/device/cuda/*.cu)
CUDA_OBJ := $(CUDA_SRC:%.cu=$(B)/%.o)
NVCC_FLAGS = -std=c++17 -O3 --fmad=false -lineinfo --threads 2 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-missing-field-initializers --Werror all-warnings \
	$(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_$(lastword $(CUDA_ARCHS)),code=compute_$(lastword $(CUDA_ARCHS))
$(CUDA_OBJ): $(B)/%.o: %.cu
	@mkdir -p $(@D)
	$(SAY) NVCC $<
	$(Q)$(NVCC) $(NVCC_FLAGS) -MD -MF $(@:.o=.d) -c $< -o $@
$(B)/libqvl-cuda.so: $(CUDA_OBJ)
	$(SAY) LD $@
	$(Q)$(NVCC) -shared -o $@ $^ -lcublasLt -Xlinker --exclude-libs,ALL -Xlinker --no-undefined

.PHONY: cuda check-gpu
check-gpu: all cuda $(B)/tests/ops/cuda_ops ## everything about the CUDA backend that needs a GPU, with a report to send (MODEL=DIR: time that checkpoint)
	PYTHON="$(PYTHON)" MODEL="$(MODEL)" tests/cuda/check_gpu.sh $(B)
cuda: ## the CUDA plug-in libqvl-cuda.so (needs the CUDA toolkit 12.8 or newer: CUDA_HOME=/usr/local/cuda)
	@test -x $(NVCC) || { echo "make cuda: no nvcc at $(NVCC). Install NVIDIA's CUDA toolkit 12.8 or newer (packages cuda-nvcc, cuda-cudart-dev, libcublas-dev) or set CUDA_HOME" >&2; exit 1; }
	@$(MAKE) --no-print-directory $(B)/libqvl-cuda.so

include tests/cuda_emu/emu.mk

# Unit tests: one cmocka program for each tests/unit/test_*.c and tests/ops/test_*.c, linked with the static library.
UNIT_SRC := $(wildcard tests/unit/test_*.c tests/ops/test_*.c tests/engine/test_*.c)
UNIT_BIN := $(UNIT_SRC:%.c=$(B)/%)
$(B)/tests/%: tests/%.c $(LIB_A)
	@mkdir -p $(@D)
	$(SAY) CC $<
	$(Q)$(CC) $(CPPFLAGS_ALL) $(CFLAGS_ALL) -MMD -MP -o $@ $< $(LIB_A) $(LDFLAGS) -lcmocka $(LDLIBS_ALL)

# The server: qvl-serve/ over qvl.h, linked with the static library.
SERVE_PKGS := libwebsockets libuv yaml-0.1 libcurl libcrypto
ifeq ($(filter deps help clean,$(MAKECMDGOALS)),)
SERVE_CFLAGS := $(shell pkg-config --cflags $(SERVE_PKGS) 2>/dev/null)
SERVE_LIBS := $(shell pkg-config --libs $(SERVE_PKGS) 2>/dev/null)
endif
SERVE_OBJ := $(patsubst qvl-serve/%.c,$(B)/serve/%.o,$(wildcard qvl-serve/*.c)) $(B)/assets/assets.o $(B)/assets/bytes.o
$(B)/serve/%.o: qvl-serve/%.c
	@mkdir -p $(@D)
	$(SAY) CC $<
	$(Q)$(CC) $(CPPFLAGS_ALL) -Iinclude $(SERVE_CFLAGS) -DQVL_DATADIR='"$(PREFIX)/share/qvl"' $(CFLAGS_ALL) -MMD -MP -c $< -o $@
$(B)/assets/assets.c: tools/assets.sh qvl-serve/openapi.json $(wildcard qvl-serve/web/*)
	$(SAY) GEN $@
	$(Q)tools/assets.sh $(B)/assets
$(B)/assets/assets.o: $(B)/assets/assets.c
	$(Q)$(CC) -Iqvl-serve $(CFLAGS_ALL) -c $< -o $@
$(B)/assets/bytes.o: $(B)/assets/assets.c
	$(Q)$(CC) -c $(B)/assets/assets.S -o $@
$(B)/qvl-serve: $(SERVE_OBJ) $(LIB_A)
	$(SAY) LD $@
	$(Q)$(CC) $(SAN) -o $@ $^ $(LDFLAGS) $(SERVE_LIBS) $(LDLIBS_ALL)

# Its modules that know nothing of sockets: one program for each tests/serve/test_*.c.
SERVE_PURE := $(patsubst %,$(B)/serve/%.o,buf id toolcall reasoning auth metrics meters log fetch)
SERVE_UNIT := $(patsubst %.c,$(B)/%,$(wildcard tests/serve/test_*.c))
$(SERVE_UNIT): $(B)/%: %.c $(SERVE_PURE)
	@mkdir -p $(@D)
	$(SAY) CC $<
	$(Q)$(CC) $(CPPFLAGS_ALL) $(CFLAGS_ALL) -MMD -MP -o $@ $< $(SERVE_PURE) $(LDFLAGS) -lcmocka $(SERVE_LIBS) $(LDLIBS_ALL)

$(B)/tests/serve/test_no_memory: LDFLAGS += -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=strdup,--wrap=strndup

.PHONY: unit unit-build serve-unit
unit-build: $(UNIT_BIN) $(SERVE_UNIT)
serve-unit: $(SERVE_UNIT) ## the C tests of the server's modules
	@for t in $(SERVE_UNIT); do echo "== $$t"; $$t || exit 1; done
unit: $(UNIT_BIN) serve-unit ## the C tests
	@$(PYTHON) tests/golden/unpack.py
	@for t in $(UNIT_BIN); do echo "== $$t"; $$t || exit 1; done

# Fuzz targets: replayed with random changes in every test run; "make fuzz" hands them to libFuzzer.
FUZZ := image messages safetensors
FUZZ_BIN := $(FUZZ:%=$(B)/tests/fuzz/fuzz_%)
FUZZ_CHANGES ?= 150
$(FUZZ_BIN): $(B)/tests/fuzz/fuzz_%: tests/fuzz/fuzz_%.c tests/fuzz/driver.c $(LIB_A)
	@mkdir -p $(@D)
	$(SAY) CC $<
	$(Q)$(CC) $(CPPFLAGS_ALL) $(CFLAGS_ALL) -o $@ $(filter %.c,$^) $(LIB_A) $(LDFLAGS) $(LDLIBS_ALL)
seeds_image := tests/golden/images/[a-gi-z]*.jpg tests/golden/images/[a-gi-z]*.png examples/images/*.webp tests/golden/images/bad/*
seeds_messages := tests/fuzz/seeds/messages/*
seeds_safetensors := tests/fuzz/seeds/safetensors/*

.PHONY: fuzz-replay fuzz
fuzz-replay: $(FUZZ_BIN) ## the fuzz targets on seeds and random changes of them
	@for t in $(FUZZ); do case $$t in $(foreach t,$(FUZZ),$t$(close) set -- $(seeds_$t);;) esac; \
		$(B)/tests/fuzz/fuzz_$$t -n $(FUZZ_CHANGES) "$$@" || exit 1; done

FUZZ_SECONDS ?= 60
fuzz: ## libFuzzer (clang) on every target, FUZZ_SECONDS=60 each
	@$(MAKE) --no-print-directory CONFIG=fuzz CC=clang fuzz-engine
.PHONY: fuzz-engine
fuzz-engine: $(LIB_A)
	@for t in $(FUZZ); do echo "== $$t"; mkdir -p $(B)/corpus_$$t; \
		case $$t in $(foreach t,$(FUZZ),$t$(close) set -- $(seeds_$t);;) esac; cp "$$@" $(B)/corpus_$$t/; \
		$(CC) $(CPPFLAGS_ALL) $(CFLAGS_ALL) -fsanitize=fuzzer -o $(B)/fuzz_$$t tests/fuzz/fuzz_$$t.c $(LIB_A) $(LDLIBS_ALL) && \
		$(B)/fuzz_$$t -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=4096 $(B)/corpus_$$t || exit 1; done

# A python that has numpy and pytest; /usr/bin/python3 has them after "make deps".
PYTHON = $(shell for p in $(PY) python3 /usr/bin/python3; do $$p -c 'import numpy, pytest' 2>/dev/null && echo $$p && break; done)
PYTEST = QVL_LIBRARY=$(CURDIR)/$(B)/libqvl.so PYTHONPATH=$(CURDIR)/bindings/python $(PYTHON) -m pytest -q -p no:cacheprovider

.PHONY: pytest
pytest: all ## goldens, invariance, bad inputs, the binding
	$(PYTEST) tests/python

.PHONY: serve-test
serve-test: $(B)/qvl-serve ## the server from outside: HTTP, HTTP/2, WebSocket, keys, limits, signals
	CONFIG=$(CONFIG) $(PYTEST) tests/serve

$(B)/tests/load/bare: tests/load/bare.c
	@mkdir -p $(@D)
	$(SAY) CC $<
	$(Q)$(CC) $(CPPFLAGS_ALL) $(SERVE_CFLAGS) $(CFLAGS_ALL) -o $@ $< $(SERVE_LIBS)
VENV := build/venv/bin/python
.PHONY: check-clients check-page check-load
check-clients: $(B)/qvl-serve ## the server with OpenAI's and LangChain's clients, locust, schemathesis (PyPI packages in build/venv)
	@tools/test_venv.sh clients
	$(VENV) -m pytest -q -p no:cacheprovider tests/clients

check-page: $(B)/qvl-serve ## the page in Debian's chromium (Playwright in build/venv); screenshots in build/screenshots
	@tools/test_venv.sh page
	$(VENV) -m pytest -q -p no:cacheprovider tests/web
check-load: $(B)/qvl-serve $(B)/tests/load/bare ## 200 streams for ten minutes, clients that leave, overhead, 10,000 idle connections
	@tools/test_venv.sh clients
	$(VENV) tests/load/soak.py
	$(VENV) tests/load/overhead.py

.PHONY: check-instructions
check-instructions: $(B)/qvl ## instructions that fixed jobs take, against tests/bench/instructions.json (valgrind)
	@tools/deps.sh instructions
	$(PYTHON) tests/bench/instructions.py

.PHONY: tool-test abi lint docs
tool-test: $(B)/qvl examples ## the command line, terminals included
	QVL_BUILD=$(CURDIR)/$(B) $(PYTEST) tests/tool
abi: all ## exported symbols, the header in four languages, an installed tree
	tests/abi/check.sh $(B)
lint: all ## who includes whom, who allocates, what is exported
	tests/lint/includes.sh
	tests/lint/symbols.sh $(B)
	tests/lint/length.sh
	tests/lint/kern_symbols.sh $(B)/libqvl/device/cpu
docs: $(B)/qvl ## docs/options.md from the library's own table
	$(B)/qvl help options --markdown > docs/options.md

# ---- what users type ----

.PHONY: deps run test check help
deps: ## install the Debian packages that are missing
	@tools/deps.sh test

run: ## describe a bundled picture with the bundled model, nothing downloaded; SERVE=1: then serve the page
	@tools/deps.sh build
	@$(MAKE) --no-print-directory -j$$(nproc) $(B)/qvl $(if $(SERVE),$(B)/qvl-serve)
	$(B)/qvl describe examples/images/shapes.png
	$(if $(SERVE),@echo "The page is at the URL below; Ctrl+C ends the server."; $(B)/qvl-serve --set log.level=warn --port $(PORT))

test: ## build everything, run all tests that fit ten minutes
	@tools/deps.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) all unit-build
	@$(MAKE) --no-print-directory unit fuzz-replay pytest tool-test serve-test lint abi

check: test ## the same as test: tests, lint and ABI together

# ---- sanitizers: the same tests, compiled to catch what tests cannot see ----

.PHONY: check-asan check-ubsan check-oom check-tsan check-long
check-asan: ## all tests under AddressSanitizer (and LeakSanitizer for the C ones)
	@tools/deps.sh test
	@$(MAKE) --no-print-directory CONFIG=asan -j$$(nproc) all unit-build
	@$(MAKE) --no-print-directory CONFIG=asan unit fuzz-replay serve-test
	@ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) $(MAKE) --no-print-directory CONFIG=asan pytest
check-ubsan: ## all tests under UndefinedBehaviorSanitizer
	@tools/deps.sh test
	@$(MAKE) --no-print-directory CONFIG=ubsan -j$$(nproc) all unit-build
	@$(MAKE) --no-print-directory CONFIG=ubsan unit fuzz-replay pytest
check-oom: ## every single allocation of a whole run made to fail
	@tools/deps.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) build/release/tests/engine/test_oom
	QVL_TEST_OOM_STEP=1 build/release/tests/engine/test_oom
check-long: ## a prompt of 262,144 tokens against a direct computation (about 15 minutes)
	@tools/deps.sh long
	@$(MAKE) --no-print-directory -j$$(nproc) all
	QVL_LONG_TOKENS=262144 $(PYTEST) tests/python/test_long.py -s
check-tsan: ## the engine's thread tests under ThreadSanitizer
	@tools/deps.sh test
	@$(MAKE) --no-print-directory CONFIG=tsan -j$$(nproc) build/tsan/tests/engine/test_engine
	QVL_TEST_REQUESTS=$${QVL_TEST_REQUESTS:-400} build/tsan/tests/engine/test_engine

# ---- install ----

.PHONY: install clean
install: all ## PREFIX=/usr/local, DESTDIR=
	install -d $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/qvl/models
	install -m 644 include/qvl.h bindings/cpp/qvl.hpp $(DESTDIR)$(PREFIX)/include/
	install -m 755 $(LIB_SO) $(DESTDIR)$(LIBDIR)/
	ln -sf $(notdir $(LIB_SO)) $(DESTDIR)$(LIBDIR)/libqvl.so.$(SOVERSION)
	ln -sf $(notdir $(LIB_SO)) $(DESTDIR)$(LIBDIR)/libqvl.so
	install -m 644 $(LIB_A) $(DESTDIR)$(LIBDIR)/
	install -m 755 $(B)/qvl $(B)/qvl-serve $(DESTDIR)$(PREFIX)/bin/
	cd examples/models && find qvl-tiny -maxdepth 1 -type f -exec install -D -m 644 {} $(DESTDIR)$(PREFIX)/share/qvl/models/{} \;
	printf 'prefix=%s\nName: qvl\nDescription: Qwen3-VL inference\nVersion: %s\nRequires.private: %s\nLibs: -L%s -lqvl\nLibs.private: -lm -lpthread\nCflags: -I%s/include\n' \
		'$(PREFIX)' '$(VERSION)' '$(PKGS)' '$(LIBDIR)' '$(PREFIX)' > $(DESTDIR)$(LIBDIR)/pkgconfig/qvl.pc

clean: ## remove build/
	rm -rf build

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

-include $(shell find $(B) -name '*.d' 2>/dev/null)
