//! Options for the files of a job: of `restore`, and of `ckpt check IMAGE`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::exit::Failure;
use crate::objects::files::left::{Choices, Chosen};
use crate::objects::options::{FilesPolicy, Options};
use crate::progress::Progress;
use crate::restore::paths::Mapping;
use crate::restore::{PutFiles, Request};
use crate::text::Shown;

/// Options for single descriptors: at a checkpoint, at a restore, and at a check of either.
#[derive(Args, Clone, Debug, Default)]
pub struct Descriptors {
    /// Open PATH as descriptor N instead of the original file; may be repeated.
    #[arg(long = "fd", visible_alias = "replace-fd", value_name = "N=PATH", value_parser = parse_fd)]
    fds: Vec<(i32, PathBuf)>,
    /// Leave descriptor N out of the restored job, or those descriptors of a kind that cannot be restored: socket,
    /// inet, unix, netlink, pipe, device, anon_inode; may be repeated.
    #[arg(long = "drop-fd", value_name = "N|KIND")]
    drop: Vec<Chosen>,
}

impl Descriptors {
    /// The options for another command line.
    pub(crate) fn words(&self) -> Vec<OsString> {
        let drop = self
            .drop
            .iter()
            .map(|chosen| format!("--drop-fd={chosen}").into());
        let fds = self.fds.iter().map(|(fd, path)| {
            let mut word = OsString::from(format!("--fd={fd}="));
            word.push(path);
            word
        });
        drop.chain(fds).collect()
    }

    /// The choices that they make.
    pub(crate) fn choices(&self) -> Result<Choices, Failure> {
        let mut replace = BTreeMap::new();
        for (fd, path) in &self.fds {
            if replace.insert(*fd, path.clone()).is_some() {
                return Err(Failure::Usage(format!(
                    "--fd {fd} is given twice; give each descriptor once"
                )));
            }
        }
        Ok(Choices {
            drop: self.drop.clone(),
            replace,
        })
    }

    /// The same for a checkpoint: the restore may be in another directory, so paths are made absolute.
    pub(crate) fn choices_to_store(&self) -> Result<Choices, Failure> {
        let mut choices = self.choices()?;
        for path in choices.replace.values_mut() {
            if let Ok(whole) = std::path::absolute(&*path) {
                *path = whole;
            }
        }
        Ok(choices)
    }
}

/// What a restore uses instead of missing or changed files.
#[derive(Args, Debug, Default)]
pub struct Places {
    #[command(flatten)]
    pub(crate) descriptors: Descriptors,
    /// Look for files at or below OLD at or below NEW: open and mapped files, programs, directories. May be repeated;
    /// the longest OLD wins.
    #[arg(long = "map-path", value_name = "OLD=NEW", value_parser = parse_mapping)]
    map_paths: Vec<Mapping>,
    /// Before the job opens them, write back the files that `--save-files` stored; never over a file that was changed
    /// after the checkpoint.
    #[arg(long)]
    put_files: bool,
    /// With --put-files: also over files that were changed after the checkpoint.
    #[arg(long, requires = "put_files")]
    overwrite: bool,
    /// What to do with files that changed since the checkpoint.
    #[arg(long, value_name = "POLICY", default_value = "strict")]
    files: Files,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Files {
    /// Refuse, and name the file and the change.
    #[default]
    Strict,
    /// Take the files as they are now.
    Adopt,
    /// As strict, but truncate files that the job was writing to their size at the checkpoint.
    Truncate,
}

impl Places {
    /// Whether an option for images was given.
    pub(crate) fn any(&self) -> bool {
        !self.map_paths.is_empty() || self.put_files || self.files != Files::Strict
    }

    /// The request to restore that image; by default a job in the foreground.
    pub(crate) fn request<'a>(
        &self,
        image: &'a Path,
        progress: &'a dyn Progress,
    ) -> Result<Request<'a>, Failure> {
        let choices = self.descriptors.choices()?;
        Ok(Request {
            objects: Options {
                files: match self.files {
                    Files::Strict => FilesPolicy::Strict,
                    Files::Adopt => FilesPolicy::Adopt,
                    Files::Truncate => FilesPolicy::Truncate,
                },
                fds: choices.replace,
                ..Options::default()
            },
            map_paths: self.mappings()?,
            put_files: match (self.put_files, self.overwrite) {
                (false, _) => PutFiles::No,
                (true, false) => PutFiles::UnlessNewer,
                (true, true) => PutFiles::Overwrite,
            },
            drop: choices.drop,
            ..Request::plain(image, progress)
        })
    }

    fn mappings(&self) -> Result<Vec<Mapping>, Failure> {
        for (index, mapping) in self.map_paths.iter().enumerate() {
            if self.map_paths[..index].iter().any(|m| m.old == mapping.old) {
                return Err(Failure::Usage(format!(
                    "--map-path {} is given twice; give each path once",
                    mapping.old.shown()
                )));
            }
        }
        Ok(self.map_paths.clone())
    }
}

fn parse_fd(text: &str) -> Result<(i32, PathBuf), String> {
    let (fd, path) = text
        .split_once('=')
        .ok_or("N=PATH is expected, such as 1=out.log")?;
    match fd.parse() {
        Ok(number) if number >= 0 && !path.is_empty() => Ok((number, path.into())),
        Ok(number) if number >= 0 => Err("the path is empty".into()),
        _ => Err(format!("{fd:?} is not the number of a descriptor")),
    }
}

fn parse_mapping(text: &str) -> Result<Mapping, String> {
    let (old, new) = text
        .split_once('=')
        .ok_or("OLD=NEW is expected, such as /old/place=/new/place")?;
    let old = PathBuf::from(old);
    if !old.is_absolute() {
        return Err(format!("{} is not an absolute path", old.shown()));
    }
    let new = std::path::absolute(new).map_err(|_| "the new path is empty")?;
    Ok(Mapping { old, new })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_parsed() {
        let mapping = parse_mapping("/a/b=/c=d").unwrap();
        assert_eq!((mapping.old, mapping.new), ("/a/b".into(), "/c=d".into()));
        assert!(parse_mapping("/a=here").unwrap().new.is_absolute());
        for bad in ["/a", "a=/b", "=/b", "/a=", ""] {
            assert!(parse_mapping(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn descriptors_are_parsed() {
        assert_eq!(parse_fd("1=out.log").unwrap(), (1, "out.log".into()));
        assert_eq!(parse_fd("10=a=b").unwrap(), (10, "a=b".into()));
        for bad in ["1", "=x", "-1=x", "x=y", "1=", "99999999999=x"] {
            assert!(parse_fd(bad).is_err(), "{bad}");
        }
    }
}
