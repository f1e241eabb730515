"""What every folder uses: cameras, configurations, the console, files, errors. Imports nothing of the
package."""
