//! What the end-to-end tests share: a pid namespace for each test ([`isolate`]), processes that
//! are reaped when they end ([`job`]), the command lines ([`tool`]), what can be seen of a
//! process from outside ([`look`]), and waiting for a state ([`wait`]).
#![allow(missing_docs, unreachable_pub)]

pub mod container;
pub mod counter;
pub mod edit;
pub mod fixture;
pub mod forging;
pub mod group;
pub mod isolate;
pub mod job;
pub mod logger;
pub mod look;
pub mod moments;
pub mod odd;
pub mod peak;
pub mod refused;
pub mod rounds;
pub mod screen;
pub mod tool;
pub mod values;
pub mod wait;

pub use {
    fixture::{Fixture, fixture},
    isolate::{Case, isolated, isolated_as_root, isolated_as_user},
    job::{Ended, Job, start},
    look::Looks,
    odd::odd,
    tool::{Output, attach, ckpt, restore_cmd, restored, run},
    wait::{holds_for, until},
};
