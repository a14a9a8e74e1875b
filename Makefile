# Everything a newcomer needs: `make demo` and `make test` do their own set-up.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.railwire-ready
# The libfabric tests run on it where it is installed (`make test-libfabric`), and on the system's.
WHEEL_LIBFABRIC := $(abspath $(VENV))/lib/mpich/libfabric.so.1
NATIVE := $(shell find native -name '*.cpp' -o -name '*.h') CMakeLists.txt pyproject.toml scripts/setup.sh

.PHONY: setup demo test test-slow test-faults soak test-vllm test-native test-libfabric test-rxe test-gpu test-first-day build-native lint check-kernels kernels format sanitize wheel bench bench-vllm bench-vllm-faults clean

setup: $(STAMP)

$(STAMP): $(NATIVE)
	scripts/setup.sh
	@touch $@

demo: setup
	$(BIN)/railwire demo

test: setup test-native
	scripts/etcd.sh
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow
	RAILWIRE_PLAN_EXAMPLES=1000 $(BIN)/python -m pytest --timeout 3600 tests/test_kv_plan.py

# 10,000 random fault schedules of the KV-cache transfer, eight at a time: most of their time is waiting.
test-faults: setup
	seq 8 | xargs -P 8 -I{} env RAILWIRE_FAULT_SCHEDULES=1250 $(BIN)/python -m pytest -q -p no:cacheprovider --timeout 7200 --seed {} tests/test_kv_faults.py

# Engines in several processes that connect, write, are stopped, killed, forked and closed: SECONDS of it, one third each
# on tcp, on shm and on the simulated wire. Seeds are printed.
SECONDS ?= 3600
soak: setup
	$(BIN)/python tests/soak --seconds $(SECONDS)

test-native: build-native
	RAILWIRE_TEST_LIBFABRICS=$(WHEEL_LIBFABRIC) build/native/railwire_tests

# The tests of the libfabric NIC on libfabric 2.x, which the mpich wheel carries; `make test` needs the system's alone.
test-libfabric: build-native
	$(BIN)/python -m pip install --quiet 'mpich>=5'
	RAILWIRE_TEST_LIBFABRICS=$(WHEEL_LIBFABRIC) build/native/railwire_tests --source-file='*libfabric*'
	$(BIN)/python -m pytest -q tests/test_two_processes.py -k stopped_writer_that_copies

# The native tests and the engine's on real queue pairs: Soft-RoCE in an emulated machine that it starts itself.
test-rxe: build-native
	scripts/test-rxe.sh

# The tests of GPU memory on this machine's GPUs, as they run in `make test` on a driver in memory.
test-gpu: build-native
	RAILWIRE_TEST_GPU=1 build/native/railwire_tests -tc='copier*,sharing*,device*,stream*'
	RAILWIRE_TEST_GPU=1 $(BIN)/python -m pytest tests/test_gpu_shm.py tests/test_gpu_tcp.py tests/test_cuda.py

# scripts/first-day.sh between two network namespaces, over tcp: about a minute.
test-first-day: setup
	$(BIN)/python -m pytest -m slow tests/test_first_day.py

build-native: setup
	$(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DRAILWIRE_PYTHON=OFF -DRAILWIRE_TESTS=ON >/dev/null
	$(BIN)/cmake --build build/native -- --quiet

# The vLLM connector against real engines; its own environment, 2.7 GB.
test-vllm: setup
	scripts/setup-vllm.sh
	.venv-vllm/bin/python -m pytest -m "not slow" tests/vllm_engine

# Railwire's connector and NIXL's, head to head; alone on the machine, about half an hour.
bench-vllm: setup
	scripts/setup-vllm.sh
	.venv-vllm/bin/python bench/vllm_connectors.py

bench-vllm-faults: setup
	scripts/setup-vllm.sh
	.venv-vllm/bin/python bench/vllm_faults.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find native -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

# native/cuda/copy_ptx.h is what copy.cu gives, and assembles for sm_80, sm_90 and sm_100. Fetches nvcc where there is none.
check-kernels: setup
	scripts/build-kernels.sh --check

kernels: setup
	scripts/build-kernels.sh

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find native -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format -i

# The native tests, and the Python tests on the simulated NIC, under ASan+UBSan and TSan.
sanitize: setup
	scripts/sanitize.sh

# manylinux_2_28 wheels for CPython 3.10 to 3.14 in dist/, each installed into a bare environment and tried.
wheel: setup
	scripts/build-wheels.sh

bench: setup
	$(BIN)/railwire bench p2p

clean:
	rm -rf build $(STAMP)
