//! Builds the freestanding restorer and checks that it is what the loader expects.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use object::elf;
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{Endianness, Object, ObjectSymbol, RelocationFlags};

/// The restorer is copied into every process that is restored; it has no reason to grow.
const MAX_SIZE: u64 = 64 * 1024;

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let restorer = manifest.join("../restorer");
    for path in ["src", "build.rs", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", restorer.join(path).display());
    }
    println!("cargo::rerun-if-changed=build.rs");

    let target_dir = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")).join("blob");
    let target = "x86_64-unknown-linux-gnu";
    let mut cargo = Command::new(env::var_os("CARGO").expect("set by cargo"));
    cargo
        .current_dir(&restorer)
        .args([
            "build",
            "--quiet",
            "--profile",
            "blob",
            "--bin",
            "restorer",
            "--target",
            target,
        ])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CKPT_BLOB", "1");
    for (name, _) in env::vars_os() {
        let n = name.to_string_lossy();
        if n.starts_with("CARGO_PROFILE_")
            || matches!(
                &*n,
                "RUSTFLAGS"
                    | "CARGO_ENCODED_RUSTFLAGS"
                    | "RUSTC_WRAPPER"
                    | "RUSTC_WORKSPACE_WRAPPER"
                    | "CARGO_TARGET_DIR"
                    | "CARGO_BUILD_TARGET"
            )
        {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status().expect("cargo can be started");
    assert!(
        status.success(),
        "building the freestanding restorer failed"
    );

    let blob = target_dir.join(target).join("blob/restorer");
    check(&std::fs::read(&blob).expect("the restorer was built"));
    println!("cargo::rustc-env=CKPT_RESTORER_BLOB={}", blob.display());
}

fn check(bytes: &[u8]) {
    let elf = ElfFile64::<Endianness>::parse(bytes).expect("the restorer is a 64-bit ELF file");
    let end = elf.endian();
    for header in elf
        .elf_header()
        .program_headers(end, bytes)
        .expect("program headers")
    {
        let kind = header.p_type(end);
        assert!(
            kind != elf::PT_INTERP,
            "the restorer wants a dynamic linker"
        );
        assert!(
            kind != elf::PT_TLS,
            "the restorer uses thread-local storage"
        );
        if kind == elf::PT_LOAD {
            let size = header.p_vaddr(end) + header.p_memsz(end);
            assert!(size <= MAX_SIZE, "the restorer has grown to {size} bytes");
        }
    }
    for (at, relocation) in elf.dynamic_relocations().into_iter().flatten() {
        assert!(
            matches!(
                relocation.flags(),
                RelocationFlags::Elf {
                    r_type: elf::R_X86_64_RELATIVE
                }
            ),
            "the restorer has a relocation at {at:#x} that its loader does not know"
        );
    }
    assert!(
        !elf.dynamic_symbols()
            .any(|s| s.is_undefined() && s.name().is_ok_and(|n| !n.is_empty())),
        "the restorer has undefined symbols"
    );
}
