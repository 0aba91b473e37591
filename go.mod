module github.com/fleetquota/fleetquota

go 1.26
