# The operator's image, for those who have a builder: docker build -t <registry>/tote:0.1.0 .
# `make image` makes the same without one.
FROM rust:1-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends protobuf-compiler && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# The C library is linked in, so the target is named: build scripts and macros must not be linked like that.
RUN target="$(uname -m)-unknown-linux-gnu" \
 && RUSTFLAGS="-C target-feature=+crt-static" \
    cargo build --release --locked -p tote-controller -p tote-agent --target "$target" \
 && mkdir /out && cp target/"$target"/release/tote-controller target/"$target"/release/tote-agent /out/

FROM scratch
COPY --from=build /out/ /
USER 65532:65532
ENTRYPOINT ["/tote-controller"]
