//! What the machine tests share.

use commonage_images::{Context, Images};
use commonage_testbed::progress::Steps;
use commonage_testbed::testbed::{Options, Testbed};

/// The images, from the cache.
pub fn images() -> Images {
    commonage_images::build(&Context::from_env().unwrap()).unwrap()
}

/// A testbed whose nodes are up.
pub fn testbed(options: &Options) -> Testbed {
    Testbed::start(options, images(), &mut Steps::new(false)).unwrap()
}
