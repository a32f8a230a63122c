"""Types that every room of the runtime uses: request and plan, geometry, progress, case folders."""
