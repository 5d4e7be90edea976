//! memfd_create(2).

use ckpt_tracer::proc::fdlink::FdLink;
use serde::{Deserialize, Serialize};

use super::Look;
use super::attributes::Attributes;
use super::kind::{Captured, OpenFile, Place, Sight};
use crate::bounds;
use crate::error::Obstacle;
use crate::index::DescriptionId;
use crate::plan::{Builder, Inherited};
use crate::source::{Collector, Source};
use crate::{Snapshot, SpaceId};

/// A memfd. Descriptions of one file share `inode`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemFd {
    /// Its name, without the `memfd:` prefix.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
    /// Inode number; the same file may be open several times.
    pub inode: u64,
    /// Size in bytes.
    #[serde(deserialize_with = "bounds::bytes")]
    pub size: u64,
    /// Permission bits.
    #[serde(deserialize_with = "bounds::mode")]
    pub mode: u32,
    /// `F_GET_SEALS`.
    pub seals: u32,
    /// Offset in bytes.
    #[serde(deserialize_with = "bounds::bytes")]
    pub offset: u64,
    /// Page size of hugetlb memory, 0 for ordinary pages.
    #[serde(deserialize_with = "bounds::page")]
    pub huge_page_size: u64,
    /// Its contents in the image.
    pub contents: SpaceId,
    /// Its other attributes.
    #[serde(default)]
    pub attributes: Option<Attributes>,
}

/// `HUGETLBFS_MAGIC`.
const HUGETLBFS: i64 = 0x9584_58f6;

/// Captures a memfd. Descriptions of one file share its contents.
fn capture(
    source: &Source,
    look: &Look,
    name: &[u8],
    collector: &mut Collector,
) -> Result<MemFd, Box<Obstacle>> {
    let inode = look.stat.st_ino;
    let mut known = collector
        .descriptions
        .iter()
        .filter_map(|d| d.kind.get::<MemFd>());
    let known = known.find(|memfd| memfd.inode == inode);
    let known = known.map(|memfd| (memfd.contents, memfd.attributes.clone()));
    let size = look.stat.st_size as u64;
    let (contents, attributes) = match known {
        Some(known) => known,
        None => {
            let contents = look.contents(source, size, &collector.held).map_err(|e| {
                let reason = format!("is a memfd that cannot be read: {e}");
                Box::new(Obstacle::without_remedy(look.object(source), reason))
            })?;
            let file = contents.as_file();
            let attributes = file.and_then(|f| Some(Attributes::of(f, &f.metadata().ok()?)));
            (collector.space_for(contents), attributes)
        }
    };
    let huge_page_size = match ckpt_sys::files::fstatfs(&look.copy) {
        Some((HUGETLBFS, block)) => block,
        _ => 0,
    };
    Ok(MemFd {
        name: name.to_vec(),
        inode,
        size,
        mode: look.stat.st_mode & 0o7777,
        seals: ckpt_sys::files::seals(&look.copy).unwrap_or(0),
        offset: look.info.pos,
        huge_page_size,
        contents,
        attributes,
    })
}

impl OpenFile for MemFd {
    fn capture(sight: &Sight, collector: &mut Collector) -> Captured {
        match &sight.look.link {
            FdLink::Memfd(name) => {
                let captured = capture(sight.source, sight.look, name, collector);
                Some(captured.map(Into::into))
            }
            _ => None,
        }
    }

    fn class(&self) -> &'static str {
        "memfd"
    }

    fn label(&self) -> String {
        format!("/memfd:{}", crate::text::of(&self.name))
    }

    fn shown(&self) -> String {
        format!("memfd:{}", crate::text::of(&self.name))
    }

    fn offset(&self) -> Option<u64> {
        Some(self.offset)
    }

    fn contents(&self) -> Option<(SpaceId, u64)> {
        Some((self.contents, self.size))
    }

    fn each_inode(&mut self, f: &mut dyn FnMut(&mut u64)) {
        f(&mut self.inode);
    }

    fn make_comparable(&mut self, _: &mut u32) {
        self.attributes.iter_mut().for_each(|a| a.accessed_ns = 0);
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        plan.inherit(place.at, Inherited::MemFd(place.index));
        Ok(())
    }

    fn seal(&self, index: DescriptionId, at: i32, snapshot: &Snapshot, plan: &mut Builder) {
        if self.seals_through(index, snapshot) {
            self.rebuild_seals(at, plan);
        }
    }
}

impl MemFd {
    /// Whether the file is sealed through this description: the first writable one, as F_ADD_SEALS requires. Without
    /// one the restoring process has sealed it already, since no process can have it mapped for writing.
    fn seals_through(&self, index: DescriptionId, snapshot: &Snapshot) -> bool {
        self.writable(snapshot).next() == Some(index)
    }

    /// Whether any description of the file is writable.
    pub fn is_writable(&self, snapshot: &Snapshot) -> bool {
        self.writable(snapshot).next().is_some()
    }

    fn writable<'a>(&self, snapshot: &'a Snapshot) -> impl Iterator<Item = DescriptionId> + 'a {
        let inode = self.inode;
        DescriptionId::each(&snapshot.descriptions)
            .filter(move |(_, d)| {
                let is_it = d.kind.get::<MemFd>().is_some_and(|m| m.inode == inode);
                is_it && d.flags as i32 & libc::O_ACCMODE != 0
            })
            .map(|(index, _)| index)
    }

    /// Seals the file.
    fn rebuild_seals(&self, at: i32, plan: &mut Builder) {
        // A file created without MFD_ALLOW_SEALING has F_SEAL_SEAL from the start.
        if self.seals & !(libc::F_SEAL_SEAL as u32) != 0 {
            let object = || format!("the seals of /memfd:{}", crate::text::of(&self.name));
            let args = [at as u64, libc::F_ADD_SEALS as u64, self.seals.into()];
            plan.syscall(libc::SYS_fcntl, &args, object);
        }
    }

    /// Flags of memfd_create(2) for such a file.
    pub fn create_flags(&self) -> u32 {
        let sealing = self.seals != libc::F_SEAL_SEAL as u32;
        let mut flags = if sealing { libc::MFD_ALLOW_SEALING } else { 0 };
        if self.huge_page_size != 0 {
            flags |= libc::MFD_HUGETLB | self.huge_page_size.trailing_zeros() << 26;
        }
        flags
    }
}
