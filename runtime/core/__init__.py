"""Types that every part of the runtime uses: request and plan, geometry, progress, case folders."""
