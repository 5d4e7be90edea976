//! The end-to-end tests: one program, since each links the same and takes as long to build.
//! A file is a subject; what they share is in `common`.

mod common;
mod measure;

mod aio;
mod attributes;
mod baseline;
mod bundle;
mod bytes;
mod cgroups;
mod chaos;
mod cli_image;
mod cli_run;
mod cli_usage;
mod clocks;
mod containers;
mod descriptors;
mod docs;
mod env;
mod exchanged;
#[cfg(feature = "faults")]
mod faults;
mod field;
mod files;
mod fixtures;
mod forged;
mod frozen_groups;
mod fuzzed;
mod groups;
mod ids;
mod init;
mod ipc;
mod jobs;
mod kill;
mod leaks;
mod machine;
mod messages;
#[cfg(feature = "faults")]
mod notices;
mod numbers;
mod openat2;
mod paths;
mod pids;
mod privileges;
mod programs;
mod refusals;
mod refused_images;
mod rehearse;
mod restore;
mod restored_forgeries;
mod run;
mod security;
mod servers;
mod service;
mod setid;
mod shared_memory;
mod sigkill;
mod sockets;
mod stopped;
mod terminal;
#[cfg(feature = "faults")]
mod torture;
mod traces;
mod unwritable;
mod vdso;
