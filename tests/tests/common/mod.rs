//! What the machine tests share.

use anyhow::Result;
use commonage_images::{Context, Images};
use commonage_testbed::progress::Steps;
use commonage_testbed::testbed::{Options, Testbed};

/// The images, from the cache.
pub fn images() -> Result<Images> {
    Ok(commonage_images::build(&Context::from_env()?)?)
}

/// A testbed whose nodes are up.
#[allow(dead_code, reason = "each test binary has its own copy of this module")]
pub fn testbed(options: &Options) -> Result<Testbed> {
    Testbed::start(options, images()?, &mut Steps::new(false))
}
