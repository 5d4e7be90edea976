//! Builds `restorer` as a freestanding program when `CKPT_BLOB` is set (by tracer/build.rs), and otherwise as an
//! ordinary stub, so that a plain `cargo build` of the workspace works.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(ckpt_blob)");
    println!("cargo::rerun-if-env-changed=CKPT_BLOB");
    if std::env::var_os("CKPT_BLOB").is_none() {
        return;
    }
    println!("cargo::rustc-cfg=ckpt_blob");
    for arg in [
        "-nostartfiles",
        "-nostdlib",
        "-static-pie",
        "-Wl,--gc-sections",
        "-Wl,-z,noexecstack",
        "-Wl,--build-id=none",
    ] {
        println!("cargo::rustc-link-arg-bin=restorer={arg}");
    }
}
