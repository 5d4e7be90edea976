//! Who creates whom, and when: the tree of a job, with its sessions and process groups.
//!
//! A child is in the session of its creator at that moment, and only setsid(2) leaves a session.
//! So a child that is still in the session its parent was born into is created before the
//! parent's setsid, and one whose session's leader has gone is created by a *phantom*: a process
//! that has the leader's id for a while. A phantom leads a group whose leader has gone, too, and a
//! zombie is a phantom that is not waited for. A process whose parent is not in its session was adopted:
//! the session's leader creates it for that parent (`CLONE_PARENT`), or by a phantom whose end leaves it to that one,
//! a child subreaper.

mod site;

use std::collections::HashMap;

use crate::Snapshot;
use crate::error::Obstacle;
use crate::process::Shares;
use crate::process::kin::Kin;
use crate::zombie::Zombie;
use site::Site;

/// A process that somebody creates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Birth {
    /// Its id.
    pub pid: i32,
    /// It becomes a child of its creator's parent (`CLONE_PARENT`).
    pub adopted: bool,
    /// What it is.
    pub body: Body,
}

impl Birth {
    /// Its id, and those of whom it creates if it is a phantom.
    pub fn ids(&self) -> Vec<i32> {
        let of_phantom: &[Birth] = match &self.body {
            Body::Phantom(phantom) => &phantom.births,
            Body::Process(_) => &[],
        };
        let left = of_phantom.iter().map(|birth| birth.pid);
        std::iter::once(self.pid).chain(left).collect()
    }

    /// Those that have ended when the job goes on and that its creator, whose child it is, has to wait for: itself,
    /// and what it leaves behind.
    pub fn helpers(&self) -> Vec<i32> {
        let Body::Phantom(phantom) = &self.body else {
            return Vec::new();
        };
        let own = phantom.zombie.is_none().then_some(self.pid);
        // The children of one that leads no session are another one's.
        let left = phantom.births.iter().filter(|_| phantom.leads_session);
        own.into_iter()
            .chain(left.flat_map(Self::helpers))
            .collect()
    }

    /// The signal by which its end before the job goes on is told, if it ends.
    pub fn tells(&self) -> Option<i32> {
        match &self.body {
            Body::Phantom(phantom) => Some(phantom.exit_signal).filter(|signal| *signal != 0),
            Body::Process(_) => None,
        }
    }
}

/// What is created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A process of the snapshot, by index.
    Process(usize),
    /// A process that ends before the job goes on.
    Phantom(Phantom),
}

/// How a process comes by its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// It executes its program.
    #[default]
    Executed,
    /// A fork leaves it its creator's.
    Forked,
    /// It has its creator's, which is that of both (`CLONE_VM`).
    Sharing,
}

/// A process that ends before the job goes on.
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
    /// What its parent will be told; without one it is waited for before the job goes on.
    pub zombie: Option<i32>,
    /// The signal that tells its parent of its end.
    pub exit_signal: i32,
    /// Whom it had been, as far as that shows: user and group, of a zombie.
    pub ids: Option<(u32, u32)>,
    /// Whom it creates.
    pub births: Vec<Birth>,
}

/// The process group of what is not its leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// One of the job.
    Of(i32),
    /// That of `restore`.
    Ours,
}

/// What one process creates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Births {
    /// Before it leads a session.
    pub early: Vec<Birth>,
    /// After.
    pub late: Vec<Birth>,
    /// It adopts the children of phantoms.
    pub adopts: bool,
    /// The group that it joins; of those that lead one or stay in that of `restore`, none.
    pub joins: Option<i32>,
    /// It is in the group of `restore`, and was not created there.
    pub joins_ours: bool,
    /// How it came by its memory.
    pub origin: Origin,
}

impl Births {
    /// Everything that it creates itself.
    pub fn all(&self) -> impl Iterator<Item = &Birth> {
        self.early.iter().chain(&self.late)
    }

    /// The processes of the snapshot that it creates, itself or by a phantom.
    pub fn processes(&self) -> Vec<usize> {
        let mut found = Vec::new();
        for birth in self.all() {
            let by_phantom: &[Birth] = match &birth.body {
                Body::Phantom(phantom) => &phantom.births,
                Body::Process(_) => std::slice::from_ref(birth),
            };
            found.extend(by_phantom.iter().filter_map(|b| match b.body {
                Body::Process(index) => Some(index),
                Body::Phantom(_) => None,
            }));
        }
        found
    }
}

/// When in the life of its creator somebody is created.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Early,
    Late,
}

struct Tree<'a> {
    processes: &'a [Kin],
    zombies: &'a [Zombie],
    index: HashMap<i32, usize>,
    births: Vec<Births>,
    /// The session that each process is born into.
    born_into: Vec<i32>,
    /// Phantoms that lead sessions, by id: the creator, and whether by `CLONE_PARENT`.
    phantoms: HashMap<i32, (usize, bool)>,
    /// Phantoms that end for their children to be adopted, by leader: their ids, and by whom.
    passing: HashMap<usize, (i32, i32)>,
    obstacles: Vec<Obstacle>,
}

/// Decides for every process of the snapshot what it creates.
///
/// # Errors
/// What cannot be brought about: sessions and groups that the kernel has no way to make again.
pub fn decide(snapshot: &Snapshot) -> Result<Vec<Births>, Vec<Obstacle>> {
    let processes: Vec<Kin> = snapshot.processes.iter().map(Kin::of).collect();
    decide_for(&processes, &snapshot.zombies)
}

/// The same of what is known of processes from outside; parents first.
///
/// # Errors
/// As [`decide`].
pub fn decide_for(processes: &[Kin], zombies: &[Zombie]) -> Result<Vec<Births>, Vec<Obstacle>> {
    let index = processes.iter().enumerate();
    let mut tree = Tree {
        processes,
        zombies,
        index: index.map(|(i, p)| (p.pid, i)).collect(),
        births: vec![Births::default(); processes.len()],
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
        Ok(tree.births)
    } else {
        Err(tree.obstacles)
    }
}

impl Tree<'_> {
    /// Who creates a child of `parent`, and whether by `CLONE_PARENT`.
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

    fn list(&mut self, creator: usize, when: When) -> &mut Vec<Birth> {
        match when {
            When::Early => &mut self.births[creator].early,
            When::Late => &mut self.births[creator].late,
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
            // It has the memory of its creator, but tables of its own.
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
        self.births[index].origin = origin;
        let adopted = matches!(site, Site::Process(_, _, true));
        self.list_at(site).push(Birth {
            pid: process.pid,
            adopted,
            body: Body::Process(index),
        });
    }

    fn shares_with_another(&mut self, process: &Kin) {
        self.obstacles.push(Obstacle::without_remedy(
            format!("process {}", process.pid),
            "shares memory or tables with a process that cannot have created it as it is now, which \
             is not supported",
        ));
    }

    /// Everything that is created, phantoms and what they create.
    fn all(&self) -> impl Iterator<Item = &Birth> {
        let own = self.births.iter().flat_map(Births::all);
        own.flat_map(|birth| {
            let of_phantom: &[Birth] = match &birth.body {
                Body::Phantom(phantom) => &phantom.births,
                Body::Process(_) => &[],
            };
            std::iter::once(birth).chain(of_phantom)
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
            births: Vec::new(),
        };
        // A leader that others were waiting for to be placed is there already.
        let creator = self.creator(zombie.parent).0;
        for when in [When::Early, When::Late] {
            let mut list = self.list(creator, when).iter_mut();
            if let Some(Birth {
                body: Body::Phantom(known),
                ..
            }) = list.find(|b| b.pid == zombie.pid)
            {
                let births = std::mem::take(&mut known.births);
                *known = Phantom { births, ..phantom };
                return;
            }
        }
        let site = self.site_of_ended(zombie);
        let adopted = matches!(site, Site::Process(_, _, true));
        self.list_at(site).push(Birth {
            pid: zombie.pid,
            adopted,
            body: Body::Phantom(phantom),
        });
    }

    /// Of what has ended the session only shows: there is no obstacle in it.
    fn site_of_ended(&mut self, zombie: &Zombie) -> Site {
        let (creator, adopted) = self.creator(zombie.parent);
        let site = self.site(zombie.parent, zombie.session, zombie.pid);
        site.unwrap_or(Site::Process(creator, When::Late, adopted))
    }

    /// Who is created in the group of `restore` need not join it. From inside a pid namespace that
    /// group has no id by which it could be joined.
    fn spare_joins(&mut self) {
        let mut created_there = vec![false; self.births.len()];
        created_there[0] = true;
        let mut next = vec![0];
        while let Some(at) = next.pop() {
            let process = &self.processes[at];
            let stays = process.group != process.pid && process.session != process.pid;
            let births = &self.births[at];
            let early = births.early.iter().map(|b| (b, created_there[at]));
            let late = births.late.iter().map(|b| (b, created_there[at] && stays));
            let mut all: Vec<(&Birth, bool)> = early.chain(late).collect();
            while let Some((birth, there)) = all.pop() {
                match &birth.body {
                    Body::Process(index) => {
                        created_there[*index] = there;
                        next.push(*index);
                    }
                    Body::Phantom(phantom) => {
                        let there = there && !phantom.leads_session && !phantom.leads_group;
                        all.extend(phantom.births.iter().map(|b| (b, there)));
                    }
                }
            }
        }
        let processes = self.processes.iter();
        for ((births, process), there) in self.births.iter_mut().zip(processes).zip(created_there) {
            births.joins_ours &= !there;
            let stays = process.group != process.pid && process.session != process.pid;
            spare_phantoms(&mut births.early, there);
            spare_phantoms(&mut births.late, there && stays);
        }
    }

    /// Shared anonymous memory goes from a process to its forks, so those who have it must descend
    /// from one that has it by forks and shared memory alone, or can be given it for them.
    fn share_memory(&mut self) {
        let mut first: HashMap<usize, usize> = HashMap::new();
        for (index, process) in self.processes.iter().enumerate() {
            let mut top = index;
            while self.births[top].origin != Origin::Executed {
                let parent = self.processes[top].parent;
                top = self.index[&parent];
            }
            for &(object, start) in &process.memory {
                let family = *first.entry(object).or_insert(top);
                if family != top {
                    self.obstacles.push(Obstacle::new(
                        format!("process {}", process.pid),
                        format!(
                            "shares anonymous memory at {:#x} with process {}, which is not of its family \
                             any more: what had created both has ended or executed another program",
                            start, self.processes[family].pid
                        ),
                        "use a memfd or a file for that memory",
                    ));
                    break;
                }
            }
        }
    }

    /// The group of a process: that of a member, of a phantom, or of `restore`.
    fn join_group(&mut self, index: usize, process: &Kin) {
        let (group, session) = (process.group, process.session);
        if group == process.pid || session == process.pid {
            return;
        }
        let site = match index {
            // Itself creates a leader of its group.
            0 => Ok(Site::Process(0, When::Late, false)),
            _ => self.site(process.parent, session, process.pid),
        };
        match self.group(group, session, site) {
            Ok(Group::Ours) => self.births[index].joins_ours = index != 0,
            Ok(Group::Of(group)) => self.births[index].joins = Some(group),
            Err(reason) => self.obstacles.push(Obstacle::without_remedy(
                format!("process {}", process.pid),
                format!("is in the process group {group} without its leader, and {reason}"),
            )),
        }
    }

    /// Likewise of what has ended.
    fn join_group_ended(&mut self, zombie: &Zombie) {
        let (group, session) = (zombie.group, zombie.session);
        // 0 is a group outside of the job's pid namespace, which has no id inside.
        if [0, zombie.pid].contains(&group) || session == zombie.pid {
            return;
        }
        let site = self.site_of_ended(zombie);
        let joins = self.group(group, session, Ok(site)).ok();
        let list = self.list_at(site).iter_mut();
        for birth in list.filter(|b| b.pid == zombie.pid) {
            if let Body::Phantom(phantom) = &mut birth.body {
                phantom.joins = joins;
            }
        }
    }

    /// A group that somebody in that session joins, who is created there; a leader that has gone is too.
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
        // What a phantom that passes creates is not waited for by who created that one.
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
        let birth = Birth {
            pid: group,
            adopted,
            body: Body::Phantom(phantom),
        };
        self.list_at(site).insert(0, birth);
        Ok(Group::Of(group))
    }
}

/// The same of what has ended, whose creator is `there`, in the group of `restore`, at that moment.
fn spare_phantoms(births: &mut [Birth], there: bool) {
    for birth in births {
        if let Body::Phantom(phantom) = &mut birth.body {
            if there && phantom.joins == Some(Group::Ours) {
                phantom.joins = None;
            }
            let there = there && !phantom.leads_session && !phantom.leads_group;
            spare_phantoms(&mut phantom.births, there);
        }
    }
}
