# The image of KubeRay's examples: `docker build -t registry.example.com/illava:0.1.0 .`
# Unbuilt: no base image could be pulled where this was written. tests/release/test_release.py executes its steps in an
# empty Python 3.11 on Debian 12, which the base image is, and runs a job there.
# Not the slim image: on a GPU, Triton compiles with gcc as the job begins, and KubeRay's probes call wget.
# torch of PyPI brings the libraries of CUDA 13.0. The host gives its driver (580 or later) by NVIDIA's container toolkit.
FROM python:3.11-bookworm
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE THIRD_PARTY_LICENSES.md ./
COPY illava/ illava/
COPY pipeline/ pipeline/
RUN pip wheel --no-cache-dir --no-deps --wheel-dir dist .
# decord's wheel bundles an FFmpeg that may not be passed on (docs/security.md): it is gone before the layer is written,
# and PyAV reads the videos.
RUN pip install --no-cache-dir -c constraints.txt "illava[s3] @ file://$(ls "$PWD"/dist/*.whl)" && pip uninstall -y decord
COPY jobs/ jobs/
COPY configs/ configs/
ENTRYPOINT ["illava"]
