//! The measured programs, run as a user runs them.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde::Deserialize;

use crate::beat::BeatPage;
use crate::sys;
use crate::target::Shape;

/// Limit of any measurement.
const PATIENCE: Duration = Duration::from_secs(120);

/// A beating target, killed when dropped.
pub(crate) struct Target {
    child: Child,
    pub(crate) page: BeatPage,
}

impl Target {
    /// Starts it and waits until it beats.
    pub(crate) fn start(scratch: &Path, shape: Shape) -> Result<Self> {
        let path = scratch.join("beats");
        let page = BeatPage::create(&path)?;
        let fill = shape.fill.to_possible_value().context("none is hidden")?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["target", "--fill", fill.get_name()]);
        let numbers = [
            ("--mib", shape.mib as usize),
            ("--threads", shape.threads),
            ("--processes", shape.processes),
        ];
        for (option, number) in numbers {
            command.arg(option).arg(number.to_string());
        }
        command.arg("--page").arg(&path);
        command.env_clear().current_dir("/");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(scratch.join("target.err"))?);
        let mut target = Target {
            child: command.spawn()?,
            page,
        };
        let begun = Instant::now();
        while page.0.ready.load(Relaxed) == 0 || page.all_beat().is_none() {
            if let Some(status) = target.child.try_wait()? {
                let said = std::fs::read_to_string(scratch.join("target.err"));
                bail!(
                    "the target ended with {status}: {}",
                    said.unwrap_or_default()
                );
            }
            ensure!(
                begun.elapsed() < PATIENCE,
                "the target is not ready after {PATIENCE:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(target)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Address and length of its memory.
    pub(crate) fn memory(&self) -> (u64, u64) {
        (
            self.page.0.address.load(Relaxed),
            self.page.0.len.load(Relaxed),
        )
    }

    /// Kills and reaps all of it, so that its pids are free.
    pub(crate) fn end(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        sys::reap_all();
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Output of `ckpt attach --json`; other keys are ignored.
#[derive(Debug, Deserialize)]
struct Said {
    memory_bytes: u64,
    image_bytes: u64,
    paused_seconds: f64,
}

/// One checkpoint.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    /// From the start of `ckpt attach` to its end.
    pub(crate) seconds: f64,
    /// Processor time of all its threads.
    pub(crate) processor: f64,
    /// The longest gap between two beats of any thread meanwhile.
    pub(crate) gap: f64,
    /// The pause as it reported it.
    pub(crate) paused: f64,
    /// Its largest resident set size.
    pub(crate) memory: u64,
    pub(crate) image_bytes: u64,
    pub(crate) memory_bytes: u64,
}

/// One restart.
#[derive(Debug)]
pub(crate) struct Restart {
    /// From the start of `restore` until all threads beat again.
    pub(crate) seconds: f64,
    /// The largest resident set size of `restore` itself.
    pub(crate) memory: u64,
}

/// Paths of `ckpt` and `restore`.
pub(crate) struct Tools {
    ckpt: PathBuf,
    restore: PathBuf,
}

impl Tools {
    pub(crate) fn find(dir: Option<&Path>) -> Result<Self> {
        let own = std::env::current_exe()?;
        let dir = dir
            .or(own.parent())
            .context("this program has no directory")?
            .canonicalize()?;
        let tools = Tools {
            ckpt: dir.join("ckpt"),
            restore: dir.join("restore"),
        };
        for tool in [&tools.ckpt, &tools.restore] {
            ensure!(
                tool.is_file(),
                "{} is not there; run `cargo build --release`, or name its directory with --bin",
                tool.display()
            );
        }
        Ok(tools)
    }

    /// `ckpt attach` of a target that continues.
    pub(crate) fn attach(&self, target: &Target, image: &Path, codec: &str) -> Result<Checkpoint> {
        crate::floor::remove(image)?;
        let mut command = Command::new(&self.ckpt);
        command.args([
            "attach",
            &target.pid().to_string(),
            "--codec",
            codec,
            "--json",
            "-o",
        ]);
        command
            .arg(image)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        target.page.reset();
        wait_for_beats(target.page)?;
        let begun = Instant::now();
        let mut child = command.spawn()?;
        let mut said = String::new();
        child
            .stdout
            .take()
            .context("piped above")?
            .read_to_string(&mut said)?;
        let ended = sys::wait_with_usage(child.id() as i32)?;
        let seconds = begun.elapsed().as_secs_f64();
        ensure!(ended.status == 0, "`ckpt attach` failed");
        // The beat that ends the longest gap may still be missing.
        let gap_ends = sys::now();
        while target.page.last_beats() < gap_ends {
            std::thread::sleep(Duration::from_millis(1));
        }
        let Said {
            memory_bytes,
            image_bytes,
            paused_seconds: paused,
        } = serde_json::from_str(&said).context("`ckpt attach --json` printed something else")?;
        let gap = target.page.longest_gap();
        Ok(Checkpoint {
            seconds,
            processor: ended.processor,
            gap,
            paused,
            memory: ended.memory,
            image_bytes,
            memory_bytes,
        })
    }

    /// `restore` in the foreground, until the job beats; then the job is killed. `pid` is the job's pid.
    pub(crate) fn restore(&self, pid: i32, page: BeatPage, image: &Path) -> Result<Restart> {
        let errors = image.with_extension("err");
        let mut command = Command::new(&self.restore);
        // The page of beats has changed, as expected.
        command.args(["--files", "adopt"]).arg(image);
        // Our clock and the job's are compared.
        command.args(["--clock", "host"]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(&errors)?);
        page.reset();
        let (begun, started) = (Instant::now(), sys::now());
        let mut child = command.spawn()?;
        let beaten = loop {
            if let Some(at) = page.all_beat() {
                break at;
            }
            let ended = child.try_wait()?;
            if ended.is_some() || begun.elapsed() > PATIENCE {
                let _ = child.kill();
                let said = std::fs::read_to_string(&errors).unwrap_or_default();
                match ended {
                    Some(status) => bail!("`restore` ended with {status}: {}", said.trim()),
                    None => bail!(
                        "nothing beats {PATIENCE:?} after `restore` began: {}",
                        said.trim()
                    ),
                }
            }
            std::thread::sleep(Duration::from_micros(500));
        };
        // wait4 would include the job's memory, since it is a child of `restore`.
        let memory = peak_memory(child.id());
        sys::kill(pid)?;
        child.wait()?;
        sys::reap_all();
        Ok(Restart {
            seconds: (beaten - started) as f64 / 1e9,
            memory: memory?,
        })
    }

    /// A command that runs a program with `ckpt run`.
    pub(crate) fn run(&self) -> Command {
        let mut command = Command::new(&self.ckpt);
        command.arg("run");
        command
    }
}

fn wait_for_beats(page: BeatPage) -> Result<()> {
    let begun = Instant::now();
    while page.all_beat().is_none() {
        ensure!(begun.elapsed() < PATIENCE, "the target has stopped beating");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// `VmHWM` of a process, in bytes.
fn peak_memory(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line
        .and_then(|text| text.trim().strip_suffix(" kB"))
        .context("no VmHWM")?;
    Ok(kib.parse::<u64>()? * 1024)
}
