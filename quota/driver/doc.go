// Package driver is for authors of stores and of wrappers around stores. Programs that use quotas need package quota only.
package driver
