// Package faulttest tests the stores on Redis while their servers and networks fail. Each test is written
// once and runs through every client library, on real servers.
//
// FLEETQUOTA_FULL=1 runs the sizes that the issues name, FLEETQUOTA_SEED repeats a run's choices.
package faulttest
