# make train       trains the default model (one to two minutes)
# make test        runs the tests (two minutes)
# make experiments runs every experiment, and writes outputs/index.html with all figures and tables
# make verify      judges every claim with fresh seeds, and writes docs/verify.md (40 minutes)
# make verify-quick   runs everything once, quickly, and judges what is exact (minutes)
# make labs        runs the course's labs: one part replaced, or a training watched
# make benchmark   measures the speed against what the machine can't avoid (ten minutes)
# make exercise CHAPTER=4                   writes exercises/chapter_04.py: functions to fill in
# make check CHAPTER=4 [FUNCTION=attend]    checks them, up to the first mistake
# make hint CHAPTER=4 FUNCTION=attend       one step further each time; make solution: ours, printed
# make predict CHAPTER=4                    asks for the chapter's numbers, then compares
# make milestone NAME=A [WITH=a_run]        checks what a part of the course ends with
# make block CHAPTER=4 NUMBER=2             runs a block of the roadmap
# make progress                             what is done, and what is next
# Each makes a virtual environment in .venv the first time, and installs nothing after that.

PYTHON ?= python3

# OpenMP threads that wait spin for a while before they sleep. Left alone they spin so long that on a
# busy machine everything stalls; asleep at once, two threads are slower than one. This is between.
export GOMP_SPINCOUNT ?= 10000

# glibc hands large freed blocks back to the system at once; fetching them again, page by page, costs a
# tenth of a run with a full cache. Let it keep them.
export MALLOC_TRIM_THRESHOLD_ ?= 4000000000
export MALLOC_MMAP_THRESHOLD_ ?= 33554432

EXPERIMENTS = wired_circuits circuit_scoreboard attention_visualization induction_head_detection \
	head_importance copy_suppression indirect_object_identification \
	feature_superposition_toy_model sparse_autoencoder grokking_experiment training_dynamics

.PHONY: train test test-slow experiments labs benchmark verify verify-quick lint \
	exercise check hint solution predict progress milestone block

train: .venv/installed
	.venv/bin/python train.py

test: .venv/installed
	.venv/bin/python -m pytest $(FLAGS)

test-slow: .venv/installed
	.venv/bin/python -m pytest -m slow $(FLAGS)

experiments: .venv/installed
	for name in $(EXPERIMENTS); do echo "$$name"; \
		.venv/bin/python experiments/$$name.py || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "not as claimed:$$failed"; exit 1; }

verify: .venv/installed
	.venv/bin/python experiments/verify.py

verify-quick: .venv/installed
	.venv/bin/python experiments/verify.py --quick

labs: .venv/installed
	for lab in course/labs/*.py; do echo "$$lab"; .venv/bin/python $$lab || failed="$$failed $$lab"; done; \
	test -z "$$failed" || { echo "not as claimed:$$failed"; exit 1; }

benchmark: .venv/installed
	.venv/bin/python experiments/benchmark.py

exercise: .venv/installed
	@.venv/bin/python course/exercise.py start $(CHAPTER)

check hint solution predict progress: .venv/installed
	@.venv/bin/python course/exercise.py $@ $(CHAPTER) $(FUNCTION)

milestone: .venv/installed
	@.venv/bin/python course/exercise.py milestone $(NAME) $(WITH)

block: .venv/installed
	@.venv/bin/python course/exercise.py block $(CHAPTER) $(NUMBER)

lint: .venv/installed-dev
	.venv/bin/ruff check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --requirement requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	.venv/bin/python -m pip install --requirement requirements-dev.txt
	touch $@
