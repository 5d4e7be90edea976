//! Which process creates which, and when: the tree of a job, with its sessions and process groups.
//!
//! A child is in the session of its creator at that moment, and only setsid(2) leaves a session. So a child in the
//! session that its parent was created in is created before the parent's setsid. A child in a session whose leader
//! has gone is created by a *phantom*: a temporary process with the leader's id. A phantom also stands for the leader
//! of a group that has gone, and an unreaped phantom for a zombie. A process whose parent is not in its
//! session was adopted: the session's leader creates it as a sibling (`CLONE_PARENT`), or through a phantom whose end
//! makes it a child of a subreaper.

mod site;

use std::collections::HashMap;

use crate::Snapshot;
use crate::error::Obstacle;
use crate::index::SharedId;
use crate::process::Shares;
use crate::process::kin::Kin;
use crate::zombie::Zombie;
use site::Site;

/// A process to be created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Creation {
    /// Its id.
    pub pid: i32,
    /// Created as a child of its creator's parent (`CLONE_PARENT`).
    pub adopted: bool,
    /// Its kind.
    pub body: Body,
}

impl Creation {
    /// Its id, and those of all that it creates if it is a phantom.
    pub fn ids(&self) -> Vec<i32> {
        let of_phantom: &[Creation] = match &self.body {
            Body::Phantom(phantom) => &phantom.creations,
            Body::Process(_) => &[],
        };
        let left = of_phantom.iter().map(|creation| creation.pid);
        std::iter::once(self.pid).chain(left).collect()
    }

    /// Temporary children that the creator has to reap before the job continues: this one, and those that its end
    /// leaves to the creator.
    pub fn helpers(&self) -> Vec<i32> {
        let Body::Phantom(phantom) = &self.body else {
            return Vec::new();
        };
        let own = phantom.zombie.is_none().then_some(self.pid);
        // Children of a phantom that leads no session are another process's.
        let left = phantom.creations.iter().filter(|_| phantom.leads_session);
        own.into_iter()
            .chain(left.flat_map(Self::helpers))
            .collect()
    }

    /// The exit signal, if it ends before the job continues.
    pub fn tells(&self) -> Option<i32> {
        match &self.body {
            Body::Phantom(phantom) => Some(phantom.exit_signal).filter(|signal| *signal != 0),
            Body::Process(_) => None,
        }
    }
}

/// The kind of process to be created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A process of the snapshot, by index.
    Process(usize),
    /// A process that ends before the job continues.
    Phantom(Phantom),
}

/// Where the memory of a process comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// From executing its program.
    #[default]
    Executed,
    /// From a fork: a copy of its creator's.
    Forked,
    /// Shared with its creator (`CLONE_VM`).
    Sharing,
}

/// A process that ends before the job continues.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Phantom {
    /// Its name.
    pub name: Vec<u8>,
    /// It leads a session.
    pub leads_session: bool,
    /// It leads a group.
    pub leads_group: bool,
    /// A group that it joins.
    pub joins: Option<Group>,
    /// Its wait status; without one it is reaped before the job continues.
    pub zombie: Option<i32>,
    /// Its exit signal.
    pub exit_signal: i32,
    /// User and group of a zombie, if known.
    pub ids: Option<(u32, u32)>,
    /// Processes that it creates.
    pub creations: Vec<Creation>,
}

/// The process group of a process that does not lead one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// A group of the job.
    Of(i32),
    /// The group of `restore`.
    Ours,
}

/// Processes that one process creates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Creations {
    /// Before its setsid(2).
    pub early: Vec<Creation>,
    /// Afterwards.
    pub late: Vec<Creation>,
    /// It is a subreaper for children of phantoms.
    pub adopts: bool,
    /// The group that it joins; `None` if it leads one or stays in that of `restore`.
    pub joins: Option<i32>,
    /// It joins the group of `restore`, in which it was not created.
    pub joins_ours: bool,
    /// Where its memory comes from.
    pub origin: Origin,
}

impl Creations {
    /// All that it creates itself.
    pub fn all(&self) -> impl Iterator<Item = &Creation> {
        self.early.iter().chain(&self.late)
    }

    /// The processes of the snapshot that it creates, itself or through a phantom.
    pub fn processes(&self) -> Vec<usize> {
        let mut found = Vec::new();
        for creation in self.all() {
            let by_phantom: &[Creation] = match &creation.body {
                Body::Phantom(phantom) => &phantom.creations,
                Body::Process(_) => std::slice::from_ref(creation),
            };
            found.extend(by_phantom.iter().filter_map(|b| match b.body {
                Body::Process(index) => Some(index),
                Body::Phantom(_) => None,
            }));
        }
        found
    }
}

/// When a process is created, relative to its creator's setsid(2).
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Early,
    Late,
}

struct Tree<'a> {
    processes: &'a [Kin],
    zombies: &'a [Zombie],
    index: HashMap<i32, usize>,
    creations: Vec<Creations>,
    /// The session in which each process is created.
    born_into: Vec<i32>,
    /// Phantoms that lead sessions, by id: the creator, and whether by `CLONE_PARENT`.
    phantoms: HashMap<i32, (usize, bool)>,
    /// Phantoms that end so that their children are adopted, by session leader: their ids, and the adopter.
    passing: HashMap<usize, (i32, i32)>,
    obstacles: Vec<Obstacle>,
}

/// Decides what every process of the snapshot creates.
///
/// # Errors
/// Sessions and groups that cannot be recreated.
pub fn decide(snapshot: &Snapshot) -> Result<Vec<Creations>, Vec<Obstacle>> {
    let processes: Vec<Kin> = snapshot.processes.iter().map(Kin::of).collect();
    decide_for(&processes, &snapshot.zombies)
}

/// The same for running processes, as seen from outside; parents first.
///
/// # Errors
/// As [`decide`].
pub fn decide_for(processes: &[Kin], zombies: &[Zombie]) -> Result<Vec<Creations>, Vec<Obstacle>> {
    let index = processes.iter().enumerate();
    let mut tree = Tree {
        processes,
        zombies,
        index: index.map(|(i, p)| (p.pid, i)).collect(),
        creations: vec![Creations::default(); processes.len()],
        born_into: Vec::with_capacity(processes.len()),
        phantoms: HashMap::new(),
        passing: HashMap::new(),
        obstacles: Vec::new(),
    };
    for (i, process) in processes.iter().enumerate() {
        tree.place(i, process);
    }
    for zombie in zombies {
        tree.place_zombie(zombie);
    }
    for (i, process) in processes.iter().enumerate() {
        tree.join_group(i, process);
    }
    for zombie in zombies {
        tree.join_group_ended(zombie);
    }
    tree.check_adoptions();
    tree.spare_joins();
    tree.share_memory();
    if tree.obstacles.is_empty() {
        Ok(tree.creations)
    } else {
        Err(tree.obstacles)
    }
}

impl Tree<'_> {
    /// The creator of a child of `parent`, and whether it uses `CLONE_PARENT`.
    fn creator(&self, parent: i32) -> (usize, bool) {
        match self.index.get(&parent) {
            Some(&at) => (at, false),
            None => (0, true),
        }
    }

    fn leads(&self, index: usize) -> bool {
        let process = &self.processes[index];
        process.session == process.pid
    }

    /// When `creator` is in that session.
    fn when(&self, creator: usize, session: i32) -> Option<When> {
        if self.leads(creator) && session == self.processes[creator].pid {
            return Some(When::Late);
        }
        (session == self.born_into[creator]).then_some(if self.leads(creator) {
            When::Early
        } else {
            When::Late
        })
    }

    fn list(&mut self, creator: usize, when: When) -> &mut Vec<Creation> {
        match when {
            When::Early => &mut self.creations[creator].early,
            When::Late => &mut self.creations[creator].late,
        }
    }

    fn place(&mut self, index: usize, process: &Kin) {
        if index == 0 {
            self.born_into.push(if process.session == process.pid {
                0
            } else {
                process.session
            });
            return;
        }
        let site = match self.site(process.parent, process.session, process.pid) {
            Ok(site) => site,
            Err(reason) => {
                self.born_into.push(process.session);
                let object = format!("process {}", process.pid);
                return self
                    .obstacles
                    .push(Obstacle::without_remedy(object, reason));
            }
        };
        let shares = process.shares;
        let origin = match (site, shares.memory) {
            (_, true) => Origin::Sharing,
            (Site::Process(_, _, false), false) if process.forked => Origin::Forked,
            _ => Origin::Executed,
        };
        let memory_alone = Shares {
            memory: shares.memory,
            ..Shares::default()
        };
        let possible = match site {
            Site::Process(_, _, false) => !(shares.files && origin == Origin::Executed),
            Site::Process(_, _, true) => shares == Shares::default(),
            // It shares its creator's memory, but has tables of its own.
            Site::Phantom(creator, _) => {
                let leads = self.passing.contains_key(&creator);
                shares
                    == if leads {
                        Shares::default()
                    } else {
                        memory_alone
                    }
            }
        };
        if !possible {
            self.shares_with_another(process);
        }
        let before = match site {
            Site::Process(creator, When::Late, _) if self.leads(creator) => {
                self.processes[creator].pid
            }
            Site::Process(creator, ..) => self.born_into[creator],
            Site::Phantom(..) => process.session,
        };
        self.born_into.push(before);
        self.creations[index].origin = origin;
        let adopted = matches!(site, Site::Process(_, _, true));
        self.list_at(site).push(Creation {
            pid: process.pid,
            adopted,
            body: Body::Process(index),
        });
    }

    fn shares_with_another(&mut self, process: &Kin) {
        self.obstacles.push(Obstacle::without_remedy(
            format!("process {}", process.pid),
            "shares memory or tables with a process that can no longer be its creator, which is not \
             supported",
        ));
    }

    /// All processes to be created, including those of phantoms.
    fn all(&self) -> impl Iterator<Item = &Creation> {
        let own = self.creations.iter().flat_map(Creations::all);
        own.flat_map(|creation| {
            let of_phantom: &[Creation] = match &creation.body {
                Body::Phantom(phantom) => &phantom.creations,
                Body::Process(_) => &[],
            };
            std::iter::once(creation).chain(of_phantom)
        })
    }

    fn place_zombie(&mut self, zombie: &Zombie) {
        let leads_session = zombie.session == zombie.pid;
        let phantom = Phantom {
            name: zombie.name.clone(),
            leads_session,
            leads_group: zombie.group == zombie.pid && !leads_session,
            joins: None,
            zombie: Some(zombie.status),
            exit_signal: zombie.exit_signal,
            ids: zombie.ids,
            creations: Vec::new(),
        };
        // A leader that other processes required earlier has been placed already.
        let creator = self.creator(zombie.parent).0;
        for when in [When::Early, When::Late] {
            let mut list = self.list(creator, when).iter_mut();
            if let Some(Creation {
                body: Body::Phantom(known),
                ..
            }) = list.find(|b| b.pid == zombie.pid)
            {
                let creations = std::mem::take(&mut known.creations);
                *known = Phantom {
                    creations,
                    ..phantom
                };
                return;
            }
        }
        let site = self.site_of_ended(zombie);
        let adopted = matches!(site, Site::Process(_, _, true));
        self.list_at(site).push(Creation {
            pid: zombie.pid,
            adopted,
            body: Body::Phantom(phantom),
        });
    }

    /// For an ended process only the session matters: this never fails.
    fn site_of_ended(&mut self, zombie: &Zombie) -> Site {
        let (creator, adopted) = self.creator(zombie.parent);
        let site = self.site(zombie.parent, zombie.session, zombie.pid);
        site.unwrap_or(Site::Process(creator, When::Late, adopted))
    }

    /// A process created in the group of `restore` need not join it. Inside a pid namespace that group has no id by
    /// which it could be joined.
    fn spare_joins(&mut self) {
        let mut created_there = vec![false; self.creations.len()];
        created_there[0] = true;
        let mut next = vec![0];
        while let Some(at) = next.pop() {
            let process = &self.processes[at];
            let stays = process.group != process.pid && process.session != process.pid;
            let creations = &self.creations[at];
            let early = creations.early.iter().map(|b| (b, created_there[at]));
            let late = creations
                .late
                .iter()
                .map(|b| (b, created_there[at] && stays));
            let mut all: Vec<(&Creation, bool)> = early.chain(late).collect();
            while let Some((creation, there)) = all.pop() {
                match &creation.body {
                    Body::Process(index) => {
                        created_there[*index] = there;
                        next.push(*index);
                    }
                    Body::Phantom(phantom) => {
                        let there = there && !phantom.leads_session && !phantom.leads_group;
                        all.extend(phantom.creations.iter().map(|b| (b, there)));
                    }
                }
            }
        }
        let processes = self.processes.iter();
        for ((creations, process), there) in
            self.creations.iter_mut().zip(processes).zip(created_there)
        {
            creations.joins_ours &= !there;
            let stays = process.group != process.pid && process.session != process.pid;
            spare_phantoms(&mut creations.early, there);
            spare_phantoms(&mut creations.late, there && stays);
        }
    }

    /// Shared anonymous memory is inherited by fork. So the processes that map it must descend from one that maps it,
    /// by forks and shared memory alone, or from an ancestor that can map it for them.
    fn share_memory(&mut self) {
        let mut first: HashMap<SharedId, usize> = HashMap::new();
        for (index, process) in self.processes.iter().enumerate() {
            let mut top = index;
            while self.creations[top].origin != Origin::Executed {
                let parent = self.processes[top].parent;
                top = self.index[&parent];
            }
            for &(object, start) in &process.memory {
                let family = *first.entry(object).or_insert(top);
                if family != top {
                    self.obstacles.push(Obstacle::new(
                        format!("process {}", process.pid),
                        format!(
                            "shares anonymous memory at {:#x} with process {}, and their common ancestor \
                             has ended or executed another program",
                            start, self.processes[family].pid
                        ),
                        "use a memfd or a file for that memory",
                    ));
                    break;
                }
            }
        }
    }

    /// The group of a process: led by a member, by a phantom, or the one of `restore`.
    fn join_group(&mut self, index: usize, process: &Kin) {
        let (group, session) = (process.group, process.session);
        if group == process.pid || session == process.pid {
            return;
        }
        let site = match index {
            // The process itself creates a leader of its group.
            0 => Ok(Site::Process(0, When::Late, false)),
            _ => self.site(process.parent, session, process.pid),
        };
        match self.group(group, session, site) {
            Ok(Group::Ours) => self.creations[index].joins_ours = index != 0,
            Ok(Group::Of(group)) => self.creations[index].joins = Some(group),
            Err(reason) => self.obstacles.push(Obstacle::without_remedy(
                format!("process {}", process.pid),
                format!("is in the process group {group} without its leader, and {reason}"),
            )),
        }
    }

    /// The same for an ended process.
    fn join_group_ended(&mut self, zombie: &Zombie) {
        let (group, session) = (zombie.group, zombie.session);
        // 0 is a group outside the job's pid namespace, without an id inside.
        if [0, zombie.pid].contains(&group) || session == zombie.pid {
            return;
        }
        let site = self.site_of_ended(zombie);
        let joins = self.group(group, session, Ok(site)).ok();
        let list = self.list_at(site).iter_mut();
        for creation in list.filter(|b| b.pid == zombie.pid) {
            if let Body::Phantom(phantom) = &mut creation.body {
                phantom.joins = joins;
            }
        }
    }

    /// A group that a process in that session joins, whose leader is created there, as a phantom if it has gone.
    fn group(
        &mut self,
        group: i32,
        session: i32,
        site: Result<Site, String>,
    ) -> Result<Group, String> {
        let root = &self.processes[0];
        let exists = self.index.contains_key(&group)
            || self.zombies.iter().any(|z| z.pid == group)
            || self.all().any(|b| b.pid == group);
        if exists {
            return Ok(Group::Of(group));
        }
        if group == root.group && session == root.session {
            return Ok(Group::Ours);
        }
        // The creator of a phantom that ends for adoption does not reap what that creates.
        let site = match site? {
            Site::Phantom(leader, _) if self.passing.contains_key(&leader) => {
                Site::Process(leader, When::Late, false)
            }
            site => site,
        };
        let phantom = Phantom {
            leads_group: true,
            exit_signal: libc::SIGCHLD,
            ..Phantom::default()
        };
        let adopted = matches!(site, Site::Process(_, _, true));
        let creation = Creation {
            pid: group,
            adopted,
            body: Body::Phantom(phantom),
        };
        self.list_at(site).insert(0, creation);
        Ok(Group::Of(group))
    }
}

/// The same for ended processes; `there` says whether their creator is in the group of `restore` then.
fn spare_phantoms(creations: &mut [Creation], there: bool) {
    for creation in creations {
        if let Body::Phantom(phantom) = &mut creation.body {
            if there && phantom.joins == Some(Group::Ours) {
                phantom.joins = None;
            }
            let there = there && !phantom.leads_session && !phantom.leads_group;
            spare_phantoms(&mut phantom.creations, there);
        }
    }
}
