//! The program that is checkpointed: a given amount of memory and number of threads or processes, some of which beat.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;

use crate::beat::{BeatPage, MAX_BEATING};
use crate::sys;

/// Contents of the memory.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Fill {
    /// Random bytes.
    Random,
    /// One half of each page random, the other half text.
    Half,
}

/// Number of beating threads or processes, the first ones.
const BEATING: usize = 5;
const _: () = assert!(BEATING <= MAX_BEATING);

/// Shape of a target.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Memory of its first process.
    #[arg(long)]
    pub(crate) mib: u64,
    #[arg(long, value_enum)]
    pub(crate) fill: Fill,
    /// Threads of its first process.
    #[arg(long)]
    pub(crate) threads: usize,
    /// Processes of one thread each but the first; its children.
    #[arg(long)]
    pub(crate) processes: usize,
}

impl Shape {
    /// One process.
    pub(crate) fn of(mib: u64, threads: usize, fill: Fill) -> Self {
        Shape {
            mib,
            fill,
            threads,
            processes: 1,
        }
    }
}

/// Arguments of the hidden subcommand `target`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[arg(long)]
    page: PathBuf,
    #[command(flatten)]
    shape: Shape,
}

static PAGE: OnceLock<BeatPage> = OnceLock::new();

/// Sets up, reports that in the page, and beats until it is killed.
pub(crate) fn run(args: &Args) -> Result<()> {
    let page = *PAGE.get_or_init(|| BeatPage::open(&args.page).expect("the page of beats"));
    let shape = &args.shape;
    let memory = sys::map_fresh((shape.mib << 20) as usize)?;
    fill(memory, shape.fill);
    let beating = shape.threads.max(shape.processes).min(BEATING);
    for number in 1..shape.processes {
        let body = if number < beating { beat } else { park };
        sys::fork_small(body, number)?;
    }
    for number in 1..shape.threads {
        let body = match number % 2 {
            _ if number < beating => beat,
            0 => park,
            _ => sleep,
        };
        sys::spawn_small(body, number)?;
    }
    page.0.address.store(memory.as_ptr() as u64, Relaxed);
    page.0.len.store(memory.len() as u64, Relaxed);
    page.0.beating.store(beating as u32, Relaxed);
    page.0.ready.store(1, Relaxed);
    beat(std::ptr::null_mut());
    Ok(())
}

extern "C" fn beat(number: *mut libc::c_void) -> *mut libc::c_void {
    let page = PAGE.get().expect("set before any thread");
    loop {
        page.beat(number as usize);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits without a time limit, as for a lock.
extern "C" fn park(_: *mut libc::c_void) -> *mut libc::c_void {
    loop {
        std::thread::park();
    }
}

/// Waits with a time limit, which a restart must not restart.
extern "C" fn sleep(_: *mut libc::c_void) -> *mut libc::c_void {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn fill(memory: &mut [u8], fill: Fill) {
    const TEXT: &[u8] = b"The quick brown fox jumps over the lazy dog, again and again. ";
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for page in memory.chunks_exact_mut(4096) {
        let random = match fill {
            Fill::Random => page.len(),
            Fill::Half => page.len() / 2,
        };
        let (noise, text) = page.split_at_mut(random);
        for word in noise.chunks_exact_mut(8) {
            // xorshift64*
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            word.copy_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
        }
        for piece in text.chunks_mut(TEXT.len()) {
            piece.copy_from_slice(&TEXT[..piece.len()]);
        }
    }
}
