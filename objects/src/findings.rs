//! What a check finds. `check`, `attach`, `restore` and their JSON share it.

use serde::Serialize;

use crate::error::{Error, Obstacle, Result};

/// Obstacles to a checkpoint or a restore, and what the user is told besides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// The obstacles, each once.
    pub obstacles: Vec<Obstacle>,
    /// Warnings and notes that hold where there is no obstacle; one sentence each.
    pub notes: Vec<String>,
}

impl Findings {
    /// Records an obstacle, unless it is known.
    pub fn refuse(&mut self, obstacle: Obstacle) {
        if !self.obstacles.contains(&obstacle) {
            self.obstacles.push(obstacle);
        }
    }

    /// Whether there is no obstacle.
    pub fn is_clear(&self) -> bool {
        self.obstacles.is_empty()
    }

    /// The notes, where there is no obstacle.
    ///
    /// # Errors
    /// [`Error::Refused`] with the obstacles.
    pub fn verdict(self) -> Result<Vec<String>> {
        match self.is_clear() {
            true => Ok(self.notes),
            false => Err(Error::Refused(self.obstacles)),
        }
    }

    /// Records the obstacles of a refusal; its result is then the default.
    ///
    /// # Errors
    /// All errors but [`Error::Refused`].
    pub fn collect<T: Default>(&mut self, result: Result<T>) -> Result<T> {
        match result {
            Err(Error::Refused(obstacles)) => {
                self.extend(obstacles);
                Ok(T::default())
            }
            other => other,
        }
    }
}

impl Extend<Obstacle> for Findings {
    fn extend<I: IntoIterator<Item = Obstacle>>(&mut self, obstacles: I) {
        obstacles
            .into_iter()
            .for_each(|obstacle| self.refuse(obstacle));
    }
}

impl From<Vec<Obstacle>> for Findings {
    fn from(obstacles: Vec<Obstacle>) -> Self {
        let mut findings = Self::default();
        findings.extend(obstacles);
        findings
    }
}
