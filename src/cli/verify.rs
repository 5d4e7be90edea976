//! `ckpt verify`: whether an image is complete and consistent.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ckpt_image::{Reader, VerifySummary};
use clap::Args;

use super::exit::{Failure, Outcome};
use super::{output, progress};
use crate::objects::references;
use crate::progress::Progress;
use crate::{Result, snapshot};

/// Arguments of `ckpt verify`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Verify {
    /// The image to verify.
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// Print nothing if the image is intact, and no progress bar.
    #[arg(short, long)]
    quiet: bool,
}

const EXAMPLES: &str = "\
Every byte is read, every digest is checked, and every reference in the metadata is followed. Faults
are printed on standard error, one a line, and the exit code is 1.

Example:
  ckpt verify job.ckpt && rm job.old.ckpt";

pub(crate) fn run(args: &Verify) -> Outcome {
    let bar = progress::on_terminal("verify", !args.quiet);
    let verified = verify(&args.image, &*bar);
    drop(bar);
    let (summary, faults) = verified?;
    let image = output::visible(args.image.as_os_str().as_bytes());
    if !faults.is_empty() {
        let lines: Vec<String> = faults
            .iter()
            .map(|fault| format!("{image}: {fault}"))
            .collect();
        return Err(Failure::Message(lines.join("\n")));
    }
    if !args.quiet {
        let pages = output::count(summary.pages, "page");
        let chunks = output::count(summary.chunks, "chunk");
        let size = output::bytes(summary.bytes);
        output::print_line(format_args!("{image}: ok, {size}, {pages} in {chunks}"))?;
    }
    Ok(0)
}

fn verify(image: &Path, bar: &dyn Progress) -> Result<(VerifySummary, Vec<String>)> {
    let reader = Reader::open(image)?;
    let mut known = 0;
    bar.begin(reader.bytes());
    let summary = reader.verify(&mut |done, _total| {
        bar.advance(done.saturating_sub(known));
        known = done;
    })?;
    bar.end();
    let snapshot = snapshot::decode(&mut snapshot::allowance(&reader), &reader, image)?;
    Ok((summary, references::check(&snapshot, &reader)))
}
